"""Sub-weights: several weights for each connection of a layer, whose sum is what the layer's weight was.

The first of them is the layer's own parameter, at its own path. The others are in the plasticity state of the
weight, each with a state of its own: ``fc.weight``, ``fc.bio_mod.sub_weight_2.weight``, and so on.

They are sampled by shares: W_γ = s_γ W, where for each connection the shares s are uniform over all that are
positive and add up to 1 (a flat Dirichlet distribution): mean 1/Γ, standard deviation
sqrt((Γ - 1) / (Γ + 1)) / Γ. So synapses of one connection are of one sign, and of none where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biofx.operators.parts import is_sharded
from biofx.operators.sampling import generator_for
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.bio_state import SUB_WEIGHT
from biofx.plasticity.model_states import bio_module_at, bio_module_path


class SubWeight(nn.Module):
    """Holds a sub-weight and its plasticity.

    Args:
        values: the weight, any shape.
        requires_grad: whether it is trained.
        groups: of the layer's convolution, a count.
    """

    def __init__(self, values: Tensor, *, requires_grad: bool, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(values, requires_grad=requires_grad)
        self.groups = groups


@torch.no_grad()
def shared_out(weight: Tensor, gamma: int, seed: int, path: str) -> list[Tensor]:
    """Return ``gamma`` weights whose sum is ``weight``, to rounding.

    Args:
        weight: any shape.
        gamma: how many, a count >= 2.
        seed: the user's seed.
        path: path of the weight; each has shares of its own.

    Returns:
        Tensors like the weight; none of them has the other sign.

    >>> parts = shared_out(torch.tensor([3.0, -1.0, 0.0]), 3, 0, "fc.weight")
    >>> torch.stack(parts).sum(0).tolist()
    [3.0, -1.0, 0.0]
    """
    generator = generator_for(seed, path, purpose="sub-weights")
    lengths = torch.empty(gamma, *weight.shape).exponential_(generator=generator)
    shares = lengths.div_(lengths.sum(0)).to(weight.device)
    parts = [(weight * share).to(weight.dtype) for share in shares[:-1]]
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    rest = weight - total
    return [*parts, torch.where(rest * weight.conj() < 0, 0, rest) if not weight.is_complex() else rest]


def add_sub_weights(model: nn.Module, state: BioModule, parts: list[Tensor], seed: int) -> list[str]:
    """Put the sub-weights of a weight but the first, which is the weight itself, into its state.

    Args:
        model: the model.
        state: of the weight.
        parts: those further sub-weights; not copied.
        seed: from which they were sampled.

    Returns:
        Their paths in the model.
    """
    paths = []
    for number, values in enumerate(parts, 2):
        held = SubWeight(values, requires_grad=state.weight.requires_grad, groups=state.groups)
        state.add_module(f"{SUB_WEIGHT}{number}", held)
        paths.append(f"{bio_module_path(state.path)}.{SUB_WEIGHT}{number}.weight")
        own = bio_module_at(model, paths[-1])
        own.config, own.depth, own.inputs_first = state.config, state.depth, state.output_axis == 1
        own.why_no_synapses = state.why_no_synapses
        own.observe_with(state)
    state.splitting_seed = seed
    return paths


def sub_weights(state: BioModule) -> dict[str, nn.Parameter]:
    """Return the further sub-weights of a weight, by their names in its state; none where it has none."""
    return {
        f"{name}.weight": module.weight
        for name, module in state._modules.items()
        if isinstance(module, SubWeight)
    }


def split_states(model: nn.Module) -> dict[str, BioModule]:
    """Return the states of the weights that have sub-weights, by the prefix of the states' keys."""
    return {
        f"{path}." if path else "": module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BioModule) and sub_weights(module)
    }


def _paths_of(model: nn.Module) -> dict[int, list[str]]:
    """Return all paths of each parameter, by its identity."""
    found: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(path)
    return found


def share_out_plain(model: nn.Module, state_dict: dict[str, Any], prefix: str = "") -> None:
    """Share the weights of a plain state out among sub-weights, as a transform of the plain model would.

    Done for each weight that the state has, if it has none of its further sub-weights. A tensor of another
    shape is left for ``load_state_dict`` to refuse.

    Args:
        model: with sub-weights.
        state_dict: a state for it, changed in place; its tensors are not.
        prefix: what its keys begin with.
    """
    states = split_states(model)
    paths = _paths_of(model) if states else {}
    for place, state in states.items():
        weight, further = state.weight, sub_weights(state)
        keys = [prefix + path for path in paths[id(weight)] if prefix + path in state_dict]
        if not keys or any(prefix + place + name in state_dict for name in further):
            continue
        given = state_dict[keys[0]]
        if not isinstance(given, Tensor) or given.shape != weight.shape or is_sharded(given):
            continue
        parts = shared_out(given, 1 + len(further), state.splitting_seed, state.path)
        names = [prefix + place + name for name in further]
        state_dict.update(dict.fromkeys(keys, parts[0]))
        state_dict.update(zip(names, parts[1:], strict=True))


def plain_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Return what the sub-weights of each weight add up to, by all paths of the weight."""
    paths = _paths_of(model)
    found: dict[str, Tensor] = {}
    for state in split_states(model).values():
        total = state.weight.detach().clone()
        for further in sub_weights(state).values():
            total += further.detach()
        found.update(dict.fromkeys(paths[id(state.weight)], total))
    return found
