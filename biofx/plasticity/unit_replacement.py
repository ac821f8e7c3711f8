"""What becomes of units that are replaced by new ones.

Of a unit that goes

* the weights and biases that make it are drawn as at the start (:mod:`biofx.plasticity.initial_weights`;
  biases are 0 unless torch draws them), with the signs of their units and the mask;
* what it contributed on average, Σ_c w_c h̄_c with h̄ the running mean of the activity, goes into the biases of
  its readers, where these have one, and the weights that read it become 0;
* gain and variance of its normalisation become 1, bias and mean 0, as torch makes them;
* what the optimizer remembers of these entries becomes 0. A count of steps that all entries of a parameter
  share stays.

Behind a zero padding a bias cannot be what a unit contributed at the border, only what it did inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.operators.mask_ops import existing
from biofx.operators.observed_inputs import RUNNING_MEAN
from biofx.plasticity.bio_state import BioState
from biofx.plasticity.consolidated_state import ConsolidatedState
from biofx.plasticity.initial_weights import InitialWeights, initial_weights, std_by_torch
from biofx.plasticity.optimizers import FORGOTTEN, ITERATES, forget_entries
from biofx.plasticity.rejuvenation import check_finite
from biofx.plasticity.saved_state import HELD_BACK, MASK, UTILITY
from biofx.plasticity.shards import whole_buffers, whole_parameters
from biofx.plasticity.unit_entries import UnitEntries, UnitNorm, UnitReader, UnitWriter, bias_name


def replace_units(
    entries: UnitEntries,
    gone: Tensor,
    means: Sequence[Tensor],
    optimizer: Optimizer | None,
    generator: Callable[[], Generator],
) -> None:
    """Replace units by new ones.

    Args:
        entries: everything that has entries of theirs.
        gone: of each unit whether it goes, bool, ``(units,)``.
        means: of each reader the mean activity at each of its input channels.
        optimizer: of all the parameters; None for one that remembers nothing.
        generator: makes a CPU generator, the only source of randomness.

    Raises:
        NonFiniteWeightError: a weight is NaN or infinite; nothing has been changed.
        PlasticityError: the optimizer holds only some of the parameters; nothing has been changed.
    """
    check_optimizer(entries, optimizer)
    places = [(module, name) for _, module, name in entries.places]
    states = _states_of(entries)
    with (
        whole_parameters(places, optimizer, FORGOTTEN | ITERATES),
        whole_buffers(states, (MASK, UTILITY, *HELD_BACK)),
    ):
        for part in (*entries.writers, *entries.readers):
            check_finite(part.state.masked_weight, part.state.path)
        for reader, mean in zip(entries.readers, means, strict=True):
            _keep_mean(reader, gone, mean)
        drawn = generator()
        for writer in entries.writers:
            _draw(writer, gone, optimizer, drawn)
        for reader in entries.readers:  # last: a recurrent weight is a writer too
            _cut(reader, gone, optimizer)
        for norm in entries.norms:
            _start_again(norm, gone, optimizer)


def _states_of(entries: UnitEntries) -> list[nn.Module]:
    """Return what is kept of the parameters that have entries of units."""
    owners = dict.fromkeys(module for _, module, _ in entries.places)
    kept = (owner._modules.get("bio_mod") for owner in owners)
    return [part for state in kept if state is not None for part in state.modules()]


def check_optimizer(entries: UnitEntries, optimizer: Optimizer | None) -> None:
    """Check that an optimizer holds everything that has entries of units.

    Raises:
        PlasticityError: it holds only some of it.
    """
    held = {id(p) for group in (optimizer.param_groups if optimizer else ()) for p in group["params"]}
    for path, parameter in entries.parameters():
        if optimizer is not None and id(parameter) not in held:
            raise PlasticityError(
                f"rejuvenate_units: expected one optimizer of all that a unit made by "
                f"{entries.writers[0].state.path!r} takes part in, found that it does not hold {path!r}; "
                "give it all parameters, or leave the layer out of unit_turnover"
            )


def _keep_mean(reader: UnitReader, gone: Tensor, mean: Tensor) -> None:
    """Add to the bias of a weight what units brought to it on average."""
    channels, bias = reader.channels.of(gone), reader.bias
    if bias is not None and len(channels):
        outputs, weights = _brought(reader, channels)
        shift = weights * mean[channels.to(mean.device), None].to(weights)
        moved = torch.zeros_like(bias).index_put_((outputs,), shift, accumulate=True)
        bias.add_(moved)
        if (held := _held(reader.state, bias_name(reader.name))) is not None:
            held.move_anchor(moved)


def _cut(reader: UnitReader, gone: Tensor, optimizer: Optimizer | None) -> None:
    """Let a weight no longer read units."""
    state, channels = reader.state, reader.channels.of(gone)
    weight = state.weight
    index = reader.index(channels)
    weight[index] = 0
    _forget(optimizer, weight, index, state)
    reader.seen[RUNNING_MEAN, channels.to(reader.seen.device)] = 0


def _brought(reader: UnitReader, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs that each of some channels leads to, and the sum of the weights on the way.

    Both are ``(channels, outputs of a group)``.
    """
    state, groups = reader.state, reader.state.groups
    weights = state.masked_weight[reader.index(channels)]
    weights = weights.reshape(*weights.shape[:2], -1).sum(2)
    group = torch.div(channels, len(reader.channels.units) // groups, rounding_mode="floor")
    outputs = group[:, None] * weights.shape[1] + torch.arange(weights.shape[1], device=channels.device)
    return outputs.to(weights.device), weights


def _draw(writer: UnitWriter, gone: Tensor, optimizer: Optimizer | None, generator: Generator) -> None:
    """Draw the weights and biases that make units anew."""
    state, rows = writer.state, writer.channels.of(gone)
    if not len(rows):
        return
    weight, index, bias = state.weight, writer.index(rows), writer.bias
    initial = initial_weights(state)
    if isinstance(initial, str):
        raise PlasticityError(f"rejuvenate_units cannot draw {state.path!r} anew: {initial}")
    made = initial.sample(len(rows) * (weight.numel() // len(writer.channels.units)), generator)
    made = made.to(weight).reshape(weight[index].shape)
    signs, mask = state.signs(), state.connection_mask
    if signs is not None:
        of_units = signs.expand(weight.shape)[index].to(made)
        made = torch.where(of_units == 0, made, made.abs() * of_units)
    if mask is not None:
        made = made * existing(mask[index])
    weight[index] = made
    _forget(optimizer, weight, index, state)
    if bias is not None:
        places = rows.to(bias.device)
        bias[places] = _new_biases(state, len(rows), generator).to(bias)
        _forget(optimizer, bias, (places,), state, bias_name(writer.name))


def _new_biases(state: BioState, count: int, generator: Generator) -> Tensor:
    """Draw biases, float64: as torch does with the weights, or 0."""
    std = std_by_torch(state) if state.config.initial_distribution == "torch" else None
    if std is None:
        return torch.zeros(count, dtype=torch.float64)
    return InitialWeights(is_normal=False, std=std).sample(count, generator)


def _start_again(norm: UnitNorm, gone: Tensor, optimizer: Optimizer | None) -> None:
    """Let a normalisation begin again for units."""
    channels = norm.channels.of(gone)
    if not len(channels):
        return
    for table, starts in (
        (norm.module._parameters, {"weight": 1.0, "bias": 0.0}),
        (norm.module._buffers, {"running_mean": 0.0, "running_var": 1.0}),
    ):
        for name, value in starts.items():
            held = table.get(name)
            if held is not None:
                index = (channels.to(held.device),)
                held[index] = value
                if isinstance(held, nn.Parameter):
                    _forget(optimizer, held, index, norm.module._modules.get("bio_mod"), name)


def _forget(
    optimizer: Optimizer | None,
    parameter: nn.Parameter,
    index: tuple[Tensor, ...],
    state: nn.Module | None,
    name: str = "weight",
) -> None:
    """Let synapses be new to the optimizer, and to what is kept of them."""
    if optimizer is not None:
        forget_entries(optimizer, parameter, index)
    held = _held(state, name)
    utility = None if held is None else held._buffers[UTILITY]
    if held is not None and (utility is not None or held.importance is not None):
        places = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        places[index] = True
        held.forget_importance(places)
        if utility is not None:
            held.start_utility(places)


def _held(state: nn.Module | None, name: str = "weight") -> ConsolidatedState | None:
    """Return the state of a parameter of a layer, None without.

    Args:
        state: of the layer's weight, in which those of its other parameters lie.
        name: of the parameter.
    """
    found = state if name == "weight" or state is None else state._modules.get(name)
    return found if isinstance(found, ConsolidatedState) and found.is_linked else None
