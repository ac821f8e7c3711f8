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
the mean over the units. What becomes of a unit that goes is in :mod:`biofx.plasticity.unit_replacement`.

Ages, the rate and the decay of the utility count runs of the rule. Where it runs at every k-th step, a rate
of k times as much and a maturity of 1/k of it replace as many units at the same age.

Deviations: activity is seen where each weight reads it, behind normalisation, pooling and dropout, instead of
behind the nonlinearity. A unit of which a synapse has a learning rate of 0 stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.operators.observed_inputs import FORWARDS, MAGNITUDE, RUNNING_MEAN, WATCHED
from biofx.plasticity.bio_state import BioState
from biofx.plasticity.initial_weights import initial_weights
from biofx.plasticity.saved_state import DRAW, FACTORS
from biofx.plasticity.turnover_clock import TurnoverClock
from biofx.plasticity.unit_entries import UnitEntries, UnitReader, zero_rates
from biofx.plasticity.unit_inputs import sum_units
from biofx.plasticity.unit_replacement import check_optimizer, replace_units

DECAY = 0.99
NOT_WATCHED = "its units are not watched (unit_turnover='continual-backprop' or 'redo')"
_LEAST = 1e-6
"""Less than one forward of the ranks of a run, a count."""


@dataclass(frozen=True)
class UnitTurnover(UnitEntries):
    """Units that are turned over."""

    clock: TurnoverClock = field(default_factory=TurnoverClock, compare=False)

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
                channels = len(reader.channels.units)
                reader.state.input_activity = torch.zeros(WATCHED, channels, **options)

    def why_never(self, lead: BioState) -> str | None:
        """Return why the units would stay, None if they would not."""
        for _, module, name in self.places:
            parameter = module._parameters[name]
            if parameter is not None and not parameter.requires_grad:
                frozen = next(path for path, held in self.parameters() if held is parameter)
                return f"{frozen!r}, which takes part, is frozen"
        if lead.unit_utility is None:
            return NOT_WATCHED
        return self._why_not_drawn

    @cached_property
    def _why_not_drawn(self) -> str | None:
        for writer in self.writers:
            initial = initial_weights(writer.state)
            if isinstance(initial, str):
                return f"what {writer.state.path!r} was drawn from is not known: {initial}"
        return None

    def run(
        self,
        lead: BioState,
        optimizer: Optimizer | None,
        generator: Callable[[], Generator],
        *,
        is_shared: bool = False,
    ) -> int:
        """Let units grow older, and replace those whose time has come; returns how many.

        Where a reader has seen nothing since the last run, nothing happens.

        Args:
            lead: the state that keeps the buffers of the units.
            optimizer: of all the parameters; None for one that remembers nothing.
            generator: makes a CPU generator, the only source of randomness.
            is_shared: whether what was seen is that of several ranks, which all call this together.

        Raises:
            PlasticityError: the optimizer holds only some of the parameters; nothing has been changed.
        """
        buffers = lead._buffers
        utility, age, due = buffers["unit_utility"], buffers["unit_age"], buffers["units_due"]
        if utility is None or age is None or due is None:
            raise PlasticityError(f"{lead.path!r}: {NOT_WATCHED}")
        if optimizer is not None and not self.clock.knows(optimizer):
            check_optimizer(self, optimizer)
            self.clock.meet(optimizer)
        seen = [reader.seen for reader in self.readers]
        if not self._has_seen(seen, age, is_shared=is_shared):
            return 0
        is_redo = lead.config.unit_turnover == "redo"
        contribution, magnitude = self._follow(seen, magnitudes=is_redo)
        utility.lerp_(contribution, 1 - DECAY)
        self.clock.grow_older(age)
        if is_redo:
            dormant = magnitude <= lead.config.unit_turnover_dormancy * magnitude.mean()
            gone = (dormant & ~self._held_by_rates()).nonzero().flatten()
        else:
            gone = self._of_least_utility(lead, utility, age, due)
        if len(gone):
            means = [self._mean_activity(reader, age) for reader in self.readers]
            is_gone = torch.zeros(self.count, dtype=torch.bool, device=age.device)
            is_gone[gone] = True
            replace_units(self, is_gone, means, optimizer, generator)
            utility[gone], age[gone] = 0, 0
        self.clock.note_seen(seen)
        return len(gone)

    def _has_seen(self, seen: Sequence[Tensor], age: Tensor, *, is_shared: bool) -> bool:
        """Whether every reader has seen something; without asking the device, where that is known."""
        changed = self.clock.have_changed(seen, age)
        if changed is False:
            return False
        if changed and not is_shared and self._reads_alone and age.device.type != "cpu":
            return True  # an empty batch is not told from others there; utilities fall a little, all alike
        for reader, held in zip(self.readers, seen, strict=True):
            own = reader.channels.own
            forwards = held[FORWARDS] if own is None else held[FORWARDS][own.to(held.device)]
            if not bool((forwards > 0).all()):
                return False
        return True

    @cached_property
    def _reads_alone(self) -> bool:
        """Whether no reader reads other units, whose turnover would write to what it has seen."""
        return all(reader.channels.own is None for reader in self.readers)

    def _follow(self, seen: Sequence[Tensor], *, magnitudes: bool) -> tuple[Tensor, Tensor]:
        """Return what each unit contributed since the last run, and its mean |h| if asked for.

        What was seen goes into the running means, and is forgotten.
        """
        contribution = magnitude = channels = torch.empty(0)
        for number, (reader, held) in enumerate(zip(self.readers, seen, strict=True)):
            place, running = reader.channels, held[RUNNING_MEAN]
            size, mean = (held[MAGNITUDE:RUNNING_MEAN] / held[FORWARDS].clamp(min=_LEAST)).unbind()
            brought = place.sum_units(size * reader.strength().to(size.dtype), self.count)
            contribution = brought if number == 0 else contribution + brought
            if magnitudes:
                summed = place.sum_units(size, self.count)
                counted = place.sum_units(torch.ones_like(size), self.count)
                magnitude = summed if number == 0 else magnitude + summed
                channels = counted if number == 0 else channels + counted
            if place.own is None:
                running.lerp_(mean, 1 - DECAY)
                held[:RUNNING_MEAN].zero_()
            else:
                own = place.own.to(held.device)
                running[own] = running[own].lerp(mean[own], 1 - DECAY)
                held[:RUNNING_MEAN, own] = 0
        return contribution, magnitude / channels if magnitudes else magnitude

    def _of_least_utility(self, lead: BioState, utility: Tensor, age: Tensor, due: Tensor) -> Tensor:
        """Return which units go, int64."""
        config, clock = lead.config, self.clock
        able = clock.mature(age, config.unit_turnover_maturity, self._rates, self._held_by_rates)
        fraction = clock.read(due) + config.unit_turnover_rate * able
        count = min(able, math.floor(fraction))
        clock.write(due, fraction - count)
        if not count:
            return torch.empty(0, dtype=torch.int64)
        eligible = ~self._held_by_rates() & (age > config.unit_turnover_maturity)
        average = utility / (1 - DECAY ** age.to(utility.dtype))
        return torch.where(eligible, average, math.inf).argsort(stable=True)[:count]

    def _mean_activity(self, reader: UnitReader, age: Tensor) -> Tensor:
        """Return h̄ at each channel of a reader that is of the units."""
        running = reader.seen[RUNNING_MEAN]
        ages = age[reader.channels.units.clamp(min=0).to(age.device)].to(running)
        return running / (1 - DECAY**ages)

    @property
    def _rates(self) -> list[Tensor]:
        """What says of the weights where learning rates are 0."""
        tables = [part.state._buffers for part in (*self.writers, *self.readers)]
        held = [table[name] for table in tables for name in (FACTORS, DRAW)]
        return [rates for rates in held if rates is not None]

    def _held_by_rates(self) -> Tensor:
        """Return which units have a synapse with a learning rate of 0, bool."""
        held = torch.zeros(self.count, dtype=torch.float32, device=self.writers[0].state.weight.device)
        for part in (*self.writers, *self.readers):
            zero = zero_rates(part.state)
            if zero is not None:
                still = sum_units(zero.to(held.dtype), **part.layout)
                held += part.channels.sum_units(still, self.count).to(held.device)
        return held > 0
