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

What happens at a run is in :mod:`biofx.plasticity.unit_turnover_run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from biofx.operators.observed_inputs import RUNNING_MEAN, WATCHED
from biofx.plasticity.bio_state import BioState
from biofx.plasticity.initial_weights import initial_weights
from biofx.plasticity.saved_state import DRAW, FACTORS
from biofx.plasticity.turnover_clock import TurnoverClock
from biofx.plasticity.unit_entries import UnitEntries, UnitReader, zero_rates
from biofx.plasticity.unit_inputs import sum_units

DECAY = 0.99
NOT_WATCHED = "its units are not watched (unit_turnover='continual-backprop' or 'redo')"


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

    @cached_property
    def reads_alone(self) -> bool:
        """Whether no reader reads other units, whose turnover would write to what it has seen."""
        return all(reader.channels.own is None for reader in self.readers)

    def mean_activity(self, reader: UnitReader, age: Tensor) -> Tensor:
        """Return h̄ at each channel of a reader that is of the units."""
        running = reader.seen[RUNNING_MEAN]
        ages = age[reader.channels.units.clamp(min=0).to(age.device)].to(running)
        return running / (1 - DECAY**ages)

    @property
    def rates(self) -> list[Tensor]:
        """What says of the weights where learning rates are 0."""
        tables = [part.state._buffers for part in (*self.writers, *self.readers)]
        held = [table[name] for table in tables for name in (FACTORS, DRAW)]
        return [rates for rates in held if rates is not None]

    def held_by_rates(self) -> Tensor:
        """Return which units have a synapse with a learning rate of 0, bool."""
        held = torch.zeros(self.count, dtype=torch.float32, device=self.writers[0].state.weight.device)
        for part in (*self.writers, *self.readers):
            zero = zero_rates(part.state)
            if zero is not None:
                still = sum_units(zero.to(held.dtype), **part.layout)
                held += part.channels.sum_units(still, self.count).to(held.device)
        return held > 0
