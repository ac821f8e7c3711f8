"""Plasticity of a model that several ranks train: replicas (DDP), shards (FSDP2, HSDP), parts of layers.

Of a sharded weight each rank keeps the state of its own part: factors, masks, what rules remember. They act
on the gradient of that part as it arrives (:mod:`biofx.operators.arriving`), so that a step needs no
communication. Some rules do their work on each rank's part (:mod:`biofx.plasticity.rules_in_parts`). One that
needs the whole weight gathers it when it is due: every rank then does the same with the same random numbers,
and keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.operators.arriving import begin_sharing, compute_in_parts, end_sharing, sharded_arrival
from biofx.operators.observed_inputs import RUNNING_MEAN
from biofx.operators.parts import gathered, is_laid_out_like, is_sharded
from biofx.plasticity.agreement import Ranks, groups_of, is_parallelized, ranks_of
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.bio_state import PER_SYNAPSE
from biofx.plasticity.model_states import bio_modules
from biofx.plasticity.optimizers import FIRST_MOMENTS, SECOND_MOMENTS
from biofx.plasticity.saved_state import MASK
from biofx.plasticity.shards import keep_part, spread_like, whole_parameters
from biofx.plasticity.tensor_parallel import refuse_in_parts

# the state of one weight


def shard_state(state: BioModule) -> None:
    """Replace the state of a sharded weight by this rank's part of it; does nothing the second time."""
    weight = state.parameter
    if weight is None or not is_sharded(weight):
        return
    owner, name = state.get_parent(), state.path.rpartition(".")[2]
    arrival = sharded_arrival(weight, owner, name)
    if arrival.weight is not weight:
        return  # a layer that is computed in parts, in a forward: the weight is sharded further otherwise
    if is_parallelized(owner):
        compute_in_parts(weight)
    for key in PER_SYNAPSE:
        state._buffers[key] = _spread(state._buffers[key], weight)
    state.memory.dampening = _spread(state.memory.dampening, weight)
    for held in (state.stored_factors, state.connection_mask):
        if held is not None and is_sharded(held):
            arrival.belong_to(held)
    state.count_connections()
    state.clear_missing()


def _spread(held: Tensor | None, weight: Tensor) -> Tensor | None:
    """Return a tensor sharded like a weight, of which it may have been sharded in another way."""
    if held is None or (is_sharded(held) and is_laid_out_like(held, weight)):
        return held
    return spread_like(gathered(held), weight)


@contextmanager
def whole(state: BioModule, optimizer: Optimizer | None = None, *, factors: bool = True) -> Iterator[None]:
    """Gather a weight, its gradient, factors and moments; at the end each rank keeps its part.

    All ranks must do it together.

    Args:
        state: of the weight.
        optimizer: whose first moments are needed, and the second ones of a masked weight.
        factors: whether the state of each synapse is needed.
    """
    weight = state.parameter
    if weight is None or not is_sharded(weight):
        yield
        return
    place = state.get_parent(), state.path.rpartition(".")[2]
    names = FIRST_MOMENTS if state.connection_mask is None else (*FIRST_MOMENTS, *SECOND_MOMENTS)
    parts = {key: held for key in PER_SYNAPSE if (held := state._buffers[key]) is not None}
    parts = {key: held for key, held in parts.items() if is_sharded(held) and (factors or key == MASK)}
    dampening = state.memory.dampening
    with whole_parameters([place], optimizer, names):
        state._buffers.update({key: gathered(held) for key, held in parts.items()})
        if factors and dampening is not None:
            state.memory.dampening = gathered(dampening)
        try:
            yield
        finally:
            for key, held in parts.items():
                changed = state._buffers[key]
                if changed is not None and changed.shape == held.shape:
                    keep_part(changed, held)
                    state._buffers[key] = held
    shard_state(state)


def shard_own_state(layer: nn.Module) -> None:
    """Replace the state of a layer that ranks compute in parts by this rank's part of it."""
    state = layer._modules.get("bio_mod")
    if isinstance(state, BioModule):
        shard_state(state)


# the states of a model


def shard_states(model: nn.Module) -> None:
    """Replace the states of all sharded weights by this rank's part of them, in place.

    Raises:
        PlasticityError: ranks compute parts of what plasticity needs all of; nothing has been changed.
    """
    refuse_in_parts(model)
    for state in bio_modules(model).values():
        shard_state(state)
    for module in model.modules():  # graphs constrain the gains of normalisations too, which have no state
        for name, parameter in module._parameters.items():
            if parameter is not None and is_sharded(parameter):
                sharded_arrival(parameter, module, name)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather all sharded weights of a model and their states; all ranks must do it together."""
    with ExitStack() as gathering:
        for state in bio_modules(model).values():
            gathering.enter_context(whole(state))
        yield


def before_forward(model: nn.Module) -> None:
    """Shard the states of a sharded model, and gather the parts that the graph does not call.

    A part that was sharded by itself gathers its weights when it is called. A graph that has taken it apart
    never calls it, so its weights are gathered, and released, with the model's own.
    """
    shard_states(model)
    groups = groups_of(model.parameters())
    parts = list(parts_not_called(model))
    if parts:
        whole_model: Any = model
        whole_model.unshard()  # first, so that it becomes the root
        for _, part in parts:
            part.unshard()
    begin_sharing(groups)


def after_forward() -> None:
    """Say that the forward of a sharded model is over."""
    end_sharing()


def refuse_parts_alone(model: nn.Module) -> None:
    """Refuse a model that is not sharded itself while parts are that the graph does not call.

    Raises:
        PlasticityError: there is such a part.
    """
    if is_fully_sharded(model):
        return
    for path, _ in parts_not_called(model):
        raise PlasticityError(
            f"expected the transformed model to be sharded as a whole too, fully_shard(bio_model) last, "
            f"found only parts of it sharded, as {path!r}, whose weights the graph reads without calling it"
        )


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module itself."""
    return hasattr(type(module), "unshard")


def parts_not_called(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules that were sharded by themselves and that the graph around them has taken apart."""
    for path, module in model.named_modules():
        if path and is_fully_sharded(module) and not _is_called(model, path):
            yield path, module


def _is_called(model: nn.Module, path: str) -> bool:
    """Whether the forward of a module is run, by a graph or by Python."""
    parts = path.split(".")
    around, inner, found = model, path, model
    for number, part in enumerate(parts[:-1]):
        found = found.get_submodule(part)
        if isinstance(found, GraphModule):
            around, inner = found, ".".join(parts[number + 1 :])
    if not isinstance(around, GraphModule) or getattr(around, "keeps_forward", False):
        return True
    called = {str(node.target) for node in around.graph.find_nodes(op="call_module")}
    names = inner.split(".")
    return any(".".join(names[: count + 1]) in called for count in range(len(names)))


# what ranks have to agree on


def ranks_to_agree_with(model: nn.Module, states: Iterable[BioModule]) -> Ranks | None:
    """Return the ranks of a model that is wrapped in DistributedDataParallel or sharded, else None.

    Raises:
        PlasticityError: factors follow activity, or connections grow by gradient, several ranks run, and the
            model does not say which of them share it; or parts of it lie on different ranks.
    """
    if (found := ranks_of(model)) is not None:
        return found
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    for state in states if several else ():
        turns_over = not isinstance(state.turnover, str)
        if state.follows_activity or state.grows_by_gradient or turns_over:
            what = "factors follow activity" if state.follows_activity else "connections grow by gradient"
            what = "units are turned over by their activity" if turns_over else what
            raise PlasticityError(
                f"{what}, and each rank sees its own: expected the model wrapped in DistributedDataParallel, "
                "or sharded, found it bare; attach the wrapper, so that ranks agree"
            )
    return None


@torch.no_grad()
def average_activity(state: BioModule, ranks: Ranks | None) -> None:
    """Replace activity by its mean over the ranks that have observed any.

    Does nothing unless factors follow activity.
    """
    if ranks is not None and state.follows_activity and state.activity is not None:
        seen = state.activity >= 0
        sums = torch.stack([state.activity * seen, seen.to(state.activity.dtype)])
        ranks.add_up(sums)
        mean = sums[0] / sums[1].clamp(min=1)
        state.activity.copy_(torch.where(sums[1] > 0, mean, state.activity))


@torch.no_grad()
def average_inputs(states: Iterable[BioModule], ranks: Ranks | None) -> None:
    """Replace what readers of units have seen since the last turnover by the mean over ranks.

    It is done after each step, so that buffers are the same on all ranks and those of one can be saved.
    """
    turnovers = [state.turnover for state in states if not isinstance(state.turnover, str)]
    readers = {id(reader.state): reader for turnover in turnovers for reader in turnover.readers}
    seen = [reader.seen[:RUNNING_MEAN] for reader in readers.values()]
    if ranks is None or not seen:
        return
    joined = torch.cat([held.flatten().to(seen[0]) for held in seen])
    ranks.add_up(joined)
    joined.div_(ranks.count)
    for held, mean in zip(seen, joined.split([held.numel() for held in seen]), strict=True):
        held.copy_(mean.view(held.shape))


@torch.no_grad()
def sum_probe(state: BioModule, ranks: Ranks | None) -> None:
    """Add up the gradient of missing connections over the ranks, where it is awaited."""
    probe = state.connection_probe
    if ranks is not None and probe is not None and probe.requires_grad:
        gradient = torch.zeros_like(probe) if probe.grad is None else probe.grad
        ranks.add_up(gradient)
        if is_parallelized(state.get_parent()):  # each rank saw the gradient of its part
            ranks.add_parts_up(gradient)
        probe.grad = gradient
