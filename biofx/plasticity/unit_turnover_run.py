"""A run of the turnover of units, of all layers at once: what :mod:`biofx.plasticity.unit_turnover` says.

The layers take turns: one whose units go has replaced them before the next one is looked at. What is done of
layers of which no unit goes is the same in any order, and is done together, with as few calls as possible: in
a small network these are what the rule costs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.operators.dispatch import is_on_host
from biofx.plasticity.bio_state import BioState
from biofx.plasticity.tensor_lists import at_least, divided, lerp_, multiplied, zero_
from biofx.plasticity.unit_entries import Channels
from biofx.plasticity.unit_replacement import check_optimizer, replace_units
from biofx.plasticity.unit_turnover import DECAY, NOT_WATCHED, UnitTurnover

_LEAST = 1e-6
"""Less than one forward of the ranks of a run, a count."""


class UnitRun:
    """The units of one layer, for one run.

    Args:
        turnover: of the units.
        lead: the state that keeps their buffers.
        generator: makes a CPU generator, the only source of randomness.

    Raises:
        PlasticityError: the units are not watched.
    """

    def __init__(self, turnover: UnitTurnover, lead: BioState, generator: Callable[[], Generator]) -> None:
        buffers = lead._buffers
        utility, age, due = buffers["unit_utility"], buffers["unit_age"], buffers["units_due"]
        if utility is None or age is None or due is None:
            raise PlasticityError(f"{lead.path!r}: {NOT_WATCHED}")
        self.turnover, self.lead, self.generator = turnover, lead, generator
        self.utility, self.age, self.due = utility, age, due
        self.seen = [reader.seen for reader in turnover.readers]
        self.rows = [turnover.clock.rows(number, seen) for number, seen in enumerate(self.seen)]
        self.count = 0
        """How many units go; -1 if that depends on what has been seen."""

    def meet(self, optimizer: Optimizer) -> None:
        """Check that an optimizer holds all that has entries of the units, once.

        Raises:
            PlasticityError: it holds only some of it.
        """
        clock = self.turnover.clock
        if not clock.knows(optimizer):
            check_optimizer(self.turnover, optimizer)
            clock.meet(optimizer)

    def to_be_seen(self, *, is_shared: bool) -> list[Tensor] | None:
        """Return counts of forwards that have to be above 0, none where that is known; None if one is not."""
        turnover = self.turnover
        changed = turnover.clock.have_changed(self.seen, self.age)
        if changed is False:
            return None
        if changed and not is_shared and turnover.reads_alone and not is_on_host(self.age):
            return []  # an empty batch is not told from others there; utilities fall a little, all alike
        counts = []
        for reader, rows in zip(turnover.readers, self.rows, strict=True):
            own = reader.channels.own
            counts.append(rows.forwards if own is None else rows.forwards[own.to(rows.forwards.device)])
        return counts

    def grow_older(self) -> None:
        """Count the run, and with it how many units go."""
        turnover, config, clock = self.turnover, self.lead.config, self.turnover.clock
        clock.grow_older(self.age)
        if config.unit_turnover == "redo":
            self.count = -1
            return
        maturity = config.unit_turnover_maturity
        able = clock.mature(self.age, maturity, turnover.rates, turnover.held_by_rates)
        fraction = clock.read(self.due) + config.unit_turnover_rate * able
        self.count = min(able, math.floor(fraction))
        clock.write(self.due, fraction - self.count)

    def choose(self, sizes: Sequence[Tensor]) -> Tensor:
        """Return which units go, int64.

        Args:
            sizes: mean |h| since the last run, of each channel of each reader.
        """
        config, held, count = self.lead.config, self.turnover.held_by_rates(), self.turnover.count
        if config.unit_turnover == "redo":
            places = [reader.channels for reader in self.turnover.readers]
            summed = _sum_units(zip(places, sizes, strict=True), count)
            channels = _sum_units(zip(places, map(torch.ones_like, sizes), strict=True), count)
            magnitude = summed / channels
            dormant = magnitude <= config.unit_turnover_dormancy * magnitude.mean()
            return (dormant & ~held).nonzero().flatten()
        eligible = ~held & (self.age > config.unit_turnover_maturity)
        average = self.utility / (1 - DECAY ** self.age.to(self.utility.dtype))
        return torch.where(eligible, average, math.inf).argsort(stable=True)[: self.count]

    def replace(self, gone: Tensor, optimizer: Optimizer | None) -> None:
        """Replace units by new ones.

        Args:
            gone: which, int64.
            optimizer: of all the parameters; None for one that remembers nothing.
        """
        turnover, age = self.turnover, self.age
        means = [turnover.mean_activity(reader, age) for reader in turnover.readers]
        is_gone = torch.zeros(turnover.count, dtype=torch.bool, device=age.device)
        is_gone[gone] = True
        replace_units(turnover, is_gone, means, optimizer, self.generator)
        self.utility[gone], age[gone] = 0, 0

    def note_seen(self) -> None:
        """Note that what was seen has been taken."""
        self.turnover.clock.note_seen(self.seen)


def turn_over_units(
    runs: Sequence[UnitRun], optimizer: Optimizer | None, *, is_shared: bool = False
) -> list[int]:
    """Let units grow older, and replace those whose time has come; returns how many, for each run.

    Where a reader has seen nothing since the last run, nothing happens.

    Args:
        runs: of the layers, in the order of the model.
        optimizer: of all the parameters; None for one that remembers nothing.
        is_shared: whether what was seen is that of several ranks, which all call this together.

    Raises:
        PlasticityError: the optimizer holds only some of the parameters; nothing has been changed.
        NonFiniteWeightError: a weight of units that go is NaN or infinite; none of these has been changed.
    """
    if optimizer is not None:
        for run in runs:
            run.meet(optimizer)
    counts = [run.to_be_seen(is_shared=is_shared) for run in runs]
    sure = _are_positive([count for each in counts for count in each or ()])
    replaced, together = dict.fromkeys(map(id, runs), 0), list[UnitRun]()
    for run, own in zip(runs, counts, strict=True):
        if own is not None and (sure or _are_positive(own)):
            run.grow_older()
            together.append(run)
            if run.count:
                replaced[id(run)] = _follow(together, optimizer)
                together = []
    _follow(together, optimizer)
    return [*replaced.values()]


def _are_positive(counts: Sequence[Tensor]) -> bool:
    if not counts:
        return True
    joined = torch.cat([count.to(counts[0].device) for count in counts]) if len(counts) > 1 else counts[0]
    return float(joined.min()) > 0


def _follow(runs: Sequence[UnitRun], optimizer: Optimizer | None) -> int:
    """Let utilities and running means follow what was seen; return how many units of the last run went."""
    if not runs:
        return 0
    rows = [each for run in runs for each in run.rows]
    places = [reader.channels for run in runs for reader in run.turnover.readers]
    strengths = [reader.strength() for run in runs for reader in run.turnover.readers]
    forwards = at_least([each.forwards for each in rows], _LEAST)
    sums = [*(each.magnitude for each in rows), *(each.mean for each in rows)]
    averages = divided(sums, (*forwards, *forwards))
    sizes, means = averages[: len(rows)], averages[len(rows) :]
    brought = iter(zip(places, multiplied(sizes, strengths), strict=True))
    contributions = [_sum_units(islice(brought, len(run.rows)), run.turnover.count) for run in runs]
    alone = [number for number, place in enumerate(places) if place.own is None]
    lerp_(
        [*(run.utility for run in runs), *(rows[number].running for number in alone)],
        [*contributions, *(means[number] for number in alone)],
        1 - DECAY,
    )
    zero_([rows[number].since for number in alone])
    for place, each, mean in zip(places, rows, means, strict=True):
        if place.own is not None:
            own = place.own.to(mean.device)
            each.running[own] = each.running[own].lerp(mean[own], 1 - DECAY)
            each.since[:, own] = 0
    for run in runs[:-1]:
        run.note_seen()
    last = runs[-1]
    replaced = 0
    if last.count:
        gone = last.choose(sizes[-len(last.rows) :])
        replaced = len(gone)
        if replaced:
            last.replace(gone, optimizer)
    last.note_seen()
    return replaced


def _sum_units(values: Iterable[tuple[Channels, Tensor]], count: int) -> Tensor:
    """Return the sum for each unit of what several readers have of it at their channels."""
    return functools.reduce(torch.add, [place.sum_units(each, count) for place, each in values])
