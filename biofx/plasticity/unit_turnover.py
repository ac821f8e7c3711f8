"""Turnover of units: those that contribute least are replaced by new ones.

Sources: Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton, "Loss of plasticity in deep continual
learning", Nature 632 (2024), doi 10.1038/s41586-024-07711-7 (continual backpropagation); Sokar, Agarwal,
Castro, Evci, "The dormant neuron phenomenon in deep reinforcement learning", ICML 2023, arXiv 2302.12902
(ReDo).

At each run of the rule every unit j grows older by one, and its utility u_j follows

    u_j ← 0.99 u_j + 0.01 Σ_c |h_c| Σ_out |w_c|,

over the input channels c at which weights read the unit (several behind ``flatten``, and at each of its
readers), with |h_c| the mean over the forwards since the last run. Divided by 1 - 0.99^age it is an average.
Under ``"continual-backprop"``, of the n units older than the maturity age the ``rate · n`` of lowest utility
go, and what is left of a unit is carried over. Under ``"redo"`` those go whose mean |h| is at most τ times
the mean over the units. Of a unit that goes

* the weights and biases that make it are drawn as at the start (:mod:`biofx.plasticity.initial_weights`;
  biases are 0 unless torch draws them), with the signs of their units and the mask;
* what it contributed on average, Σ_c w_c h̄_c with h̄ the running mean of the activity, goes into the biases of
  its readers, where these have one, and the weights that read it become 0;
* gain and variance of its normalisation become 1, bias and mean 0, as torch makes them;
* all that the optimizer remembers of these entries becomes 0, and so do age, utility and h̄.

Deviations: activity is seen where each weight reads it, behind normalisation, pooling and dropout, instead of
behind the nonlinearity.
Behind a zero padding a bias cannot be what a unit contributed at the border, only what it did inside.
A unit of which a synapse has a learning rate of 0 stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.operators.mask_ops import existing
from biofx.operators.observed_inputs import FORWARDS, MAGNITUDE, MEAN, RUNNING_MEAN, WATCHED
from biofx.plasticity.bio_state import BioState
from biofx.plasticity.consolidated_state import ConsolidatedState
from biofx.plasticity.initial_weights import InitialWeights, initial_weights
from biofx.plasticity.optimizers import forget_entries
from biofx.plasticity.rejuvenation import check_finite
from biofx.plasticity.shards import is_sharded
from biofx.plasticity.unit_inputs import broadcast_units, rows_of_units, sum_units, weight_of_rows

DECAY = 0.99
NOT_WATCHED = "its units are not watched (unit_turnover='continual-backprop' or 'redo')"


@dataclass(frozen=True)
class UnitWriter:
    """A weight that makes units."""

    state: BioState
    units: Tensor
    """Which of the units each of its outputs is, int64."""

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that its layer adds."""
        return _bias_of(self.state)


@dataclass(frozen=True)
class UnitReader:
    """A weight that reads units, and perhaps others."""

    state: BioState
    units: Tensor
    """Which of the units each of its input channels is, int64; -1 where it is none of them."""

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that its layer adds."""
        return _bias_of(self.state)

    @property
    def seen(self) -> Tensor:
        """What it has read, ``(4, input channels)``."""
        held = self.state.input_activity
        if held is None:
            raise PlasticityError(
                f"{self.state.path!r}: what it reads is not watched; transform the model again"
            )
        return held

    @property
    def input_layout(self) -> dict[str, int]:
        """How the input channels lie in the weight, as functions on units take it."""
        return {"output_axis": 1 - self.state.output_axis, "groups": self.state.groups}


@dataclass(frozen=True)
class UnitNorm:
    """A normalisation that units pass through, and perhaps others."""

    module: nn.Module
    units: Tensor
    """Which of the units each of its channels is, int64; -1 where it is none of them."""


@dataclass(frozen=True)
class UnitTurnover:
    """Units that are turned over: everything that has entries of theirs."""

    count: int
    writers: Sequence[UnitWriter]
    readers: Sequence[UnitReader]
    norms: Sequence[UnitNorm]

    def start(self, lead: BioState) -> None:
        """Add the buffers that the rule needs to the states of the weights."""
        weight = lead.weight
        real = torch.promote_types(weight.dtype, torch.float32)
        options: dict[str, Any] = {"dtype": real, "device": weight.device}
        lead.unit_utility = torch.zeros(self.count, **options)
        lead.unit_age = torch.zeros(self.count, dtype=torch.int64, device=weight.device)
        lead.units_due = torch.zeros((), dtype=torch.float64, device=weight.device)
        for reader in self.readers:
            if reader.state.input_activity is None:
                reader.state.input_activity = torch.zeros(WATCHED, len(reader.units), **options)

    def why_never(self, lead: BioState) -> str | None:
        """Return why the units would stay, None if they would not."""
        for path, parameter in self.parameters():
            if not parameter.requires_grad:
                return f"{path!r}, which takes part, is frozen"
            if is_sharded(parameter):
                return f"{path!r}, which takes part, is sharded (fully_shard)"
        for writer in self.writers:
            initial = initial_weights(writer.state)
            if isinstance(initial, str):
                return f"what {writer.state.path!r} was drawn from is not known: {initial}"
        return None if lead.unit_utility is not None else NOT_WATCHED

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter with entries of the units, with a name for it."""
        for part in self._weights:
            yield part.state.path, part.state.weight
            if part.bias is not None:
                yield f"the bias beside {part.state.path}", part.bias
        for norm in self.norms:
            for name, parameter in norm.module._parameters.items():
                if parameter is not None:
                    yield f"the {name} of a {type(norm.module).__name__}", parameter

    def run(self, lead: BioState, optimizer: Optimizer | None, generator: Callable[[], Generator]) -> int:
        """Let units grow older, and replace those whose time has come; returns how many.

        Where a reader has seen nothing since the last run, nothing happens.

        Args:
            lead: the state that keeps the buffers of the units.
            optimizer: of all the parameters; None for one that remembers nothing.
            generator: makes a CPU generator, the only source of randomness.
        """
        utility, age, due = lead.unit_utility, lead.unit_age, lead.units_due
        if utility is None or age is None or due is None:
            raise PlasticityError(f"{lead.path!r}: {NOT_WATCHED}")
        if any(
            not bool((reader.seen[FORWARDS] > 0)[_own(reader, reader.seen.device)].all())
            for reader in self.readers
        ):
            return 0
        contribution, magnitude = torch.zeros_like(utility), torch.zeros_like(utility)
        channels = torch.zeros_like(utility)
        for reader in self.readers:
            seen, own = reader.seen, _own(reader, reader.seen.device)
            units = reader.units.to(seen.device)[own]
            strength = sum_units(reader.state.masked_weight.abs(), **reader.input_layout).to(seen.dtype)
            contribution.index_add_(0, units, (seen[MAGNITUDE] * strength)[own])
            magnitude.index_add_(0, units, seen[MAGNITUDE][own])
            channels.index_add_(0, units, torch.ones_like(seen[MAGNITUDE][own]))
            running = DECAY * seen[RUNNING_MEAN] + (1 - DECAY) * seen[MEAN]
            seen[RUNNING_MEAN] = torch.where(own, running, seen[RUNNING_MEAN])
            seen[FORWARDS] = torch.where(own, 0, seen[FORWARDS])
        age.add_(1)
        utility.mul_(DECAY).add_(contribution, alpha=1 - DECAY)
        gone = self._chosen(lead, utility, age, due, magnitude / channels)
        count = int(gone.count_nonzero())
        if count:
            self._replace(lead, age, gone, optimizer, generator)
            utility[gone], age[gone] = 0, 0
        return count

    def _chosen(self, lead: BioState, utility: Tensor, age: Tensor, due: Tensor, magnitude: Tensor) -> Tensor:
        """Return which units go, bool."""
        config, movable = lead.config, ~self._held_by_rates(utility)
        if config.unit_turnover == "redo":
            return movable & (magnitude <= config.unit_turnover_dormancy * magnitude.mean())
        eligible = movable & (age > config.unit_turnover_maturity)
        able = int(eligible.count_nonzero())
        due.add_(config.unit_turnover_rate * able)
        count = min(able, math.floor(float(due)))
        due.sub_(count)
        average = utility / (1 - DECAY ** age.to(utility.dtype))
        order = torch.where(eligible, average, math.inf).argsort(stable=True)
        chosen = torch.zeros_like(eligible)
        chosen[order[:count]] = True
        return chosen

    def _held_by_rates(self, like: Tensor) -> Tensor:
        """Return which units have a synapse with a learning rate of 0, bool."""
        held = torch.zeros_like(like)
        for part in self._weights:
            factors = part.state.zero_rates()
            if factors is None:
                continue
            layout = _layout(part.state) if isinstance(part, UnitWriter) else part.input_layout
            still = sum_units(factors.to(like.dtype), **layout)
            own = _own(part, like.device)
            held.index_add_(0, part.units.to(like.device)[own], still[own])
        return held > 0

    def _replace(
        self,
        lead: BioState,
        age: Tensor,
        gone: Tensor,
        optimizer: Optimizer | None,
        generator: Callable[[], Generator],
    ) -> None:
        self._check(optimizer)
        made, read, normed = (
            [gone[part.units.to(gone.device)] & _own(part, gone.device) for part in parts]
            for parts in (self.writers, self.readers, self.norms)
        )
        for reader, here in zip(self.readers, read, strict=True):
            if reader.bias is not None:
                ages = age[reader.units.to(age.device)].to(reader.seen.dtype)
                mean = torch.where(here, reader.seen[RUNNING_MEAN] / (1 - DECAY**ages), 0)
                weight = reader.state.masked_weight
                brought = weight * broadcast_units(mean.to(weight), weight, **reader.input_layout)
                moved = sum_units(brought, **_layout(reader.state))
                reader.bias.add_(moved)
                if (held := _held(reader.state, "bias")) is not None:
                    held.move_anchor(moved)
        drawn = generator()
        for writer, here in zip(self.writers, made, strict=True):
            state, layout = writer.state, _layout(writer.state)
            weight, rows = state.weight, rows_of_units(state.weight, **layout).clone()
            new = torch.zeros_like(rows)
            new[here] = _new_weights(state, int(here.sum()), drawn).to(rows)
            made_new = weight_of_rows(new, weight, **layout)
            signs, mask = state.signs(), state.connection_mask
            if signs is not None:
                made_new = torch.where(signs == 0, made_new, made_new.abs() * signs.to(made_new))
            if mask is not None:
                made_new = made_new * existing(mask)
            entries = broadcast_units(here, weight, **layout).expand(weight.shape)
            weight.copy_(torch.where(entries, made_new, weight))
            state.start_utility(entries)
            _forget(optimizer, weight, entries, _held(state))
            if writer.bias is not None:
                writer.bias[here] = _new_biases(state, int(here.sum()), drawn).to(writer.bias)
                _forget(optimizer, writer.bias, here, _held(state, "bias"))
        for reader, here in zip(self.readers, read, strict=True):
            weight = reader.state.weight
            entries = broadcast_units(here, weight, **reader.input_layout).expand(weight.shape)
            weight.masked_fill_(entries, 0)
            reader.state.start_utility(entries)
            _forget(optimizer, weight, entries, _held(reader.state))
            reader.seen[RUNNING_MEAN].masked_fill_(here, 0)
        for norm, here in zip(self.norms, normed, strict=True):
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                parameter = norm.module._parameters.get(name)
                if parameter is not None:
                    parameter.masked_fill_(here, value)
                    _forget(optimizer, parameter, here, _held(norm.module._modules.get("bio_mod"), name))
            for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
                statistic = norm.module._buffers.get(name)
                if statistic is not None:
                    statistic.masked_fill_(here, value)

    @property
    def _weights(self) -> list[UnitWriter | UnitReader]:
        return [*self.writers, *self.readers]

    def _check(self, optimizer: Optimizer | None) -> None:
        """Check, before any is changed, the weights and who steps them."""
        for part in self._weights:
            check_finite(part.state.masked_weight, part.state.path)
        held = {id(p) for group in (optimizer.param_groups if optimizer else ()) for p in group["params"]}
        for path, parameter in self.parameters():
            if optimizer is not None and id(parameter) not in held:
                raise PlasticityError(
                    f"rejuvenate_units: expected one optimizer of all that a unit made by "
                    f"{self.writers[0].state.path!r} takes part in, found that it does not hold {path}; give "
                    "it all parameters, or leave the layer out of unit_turnover"
                )


def _new_weights(state: BioState, rows: int, generator: Generator) -> Tensor:
    """Draw what makes some units anew, float64, ``(rows, synapses of a unit)``."""
    initial = initial_weights(state)
    if isinstance(initial, str):
        raise PlasticityError(f"rejuvenate_units cannot draw {state.path!r} anew: {initial}")
    synapses = state.weight.numel() // state.units
    return initial.sample(rows * synapses, generator).reshape(rows, synapses)


def _new_biases(state: BioState, rows: int, generator: Generator) -> Tensor:
    """Draw their biases, float64: as torch does with the weights, or 0."""
    if state.config.initial_distribution != "torch":
        return torch.zeros(rows, dtype=torch.float64)
    std = 1 / math.sqrt(3 * state.weight.shape[1:].numel())
    return InitialWeights(is_normal=False, std=std).sample(rows, generator)


def _forget(
    optimizer: Optimizer | None, parameter: nn.Parameter, entries: Tensor, held: ConsolidatedState | None
) -> None:
    if optimizer is not None:
        forget_entries(optimizer, parameter, entries)
    if held is not None:
        held.forget_importance(entries)


def _held(state: nn.Module | None, name: str = "weight") -> ConsolidatedState | None:
    """Return what holds a parameter of a layer back, None without.

    Args:
        state: of the layer's weight, in which those of its other parameters lie.
        name: of the parameter.
    """
    found = state if name == "weight" or state is None else state._modules.get(name)
    return found if isinstance(found, ConsolidatedState) and found.is_linked else None


def _layout(state: BioState) -> dict[str, int]:
    return {"output_axis": state.output_axis, "groups": state.groups}


def _own(part: UnitWriter | UnitReader | UnitNorm, device: torch.device) -> Tensor:
    """Return which channels of a weight or a normalisation are of the units, bool."""
    return (part.units >= 0).to(device)


def _bias_of(state: BioState) -> nn.Parameter | None:
    found: nn.Parameter | None = state.get_parent()._parameters.get("bias")
    return found
