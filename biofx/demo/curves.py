"""What a demo measures: curves of a plain and a rewritten network, one of each for each seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from biofx.rewriting.report import Report

PLAIN, BIO = "plain", "bio"


@dataclass
class Run:
    """How the training of one network went."""

    name: str
    """``"plain"`` or ``"bio"``."""
    seed: int
    measured: dict[str, list[float]] = field(default_factory=dict)
    """Each measure, task by task or epoch by epoch."""
    replaced_units: int = 0
    """By ``rejuvenate_units``, a count."""

    def add(self, **values: float) -> None:
        """Add the values of the next task or epoch."""
        for measure, value in values.items():
            self.measured.setdefault(measure, []).append(value)


@dataclass(frozen=True)
class Outcome:
    """What a demo comes to."""

    runs: Sequence[Run]
    report: Report
    """What biofx changed in the first seed's network; the others' differ in nothing but draws."""

    def curves(self, name: str, measure: str) -> Tensor:
        """Return a measure of one kind of network, float64, ``(seeds, tasks or epochs)``."""
        found = [run.measured[measure] for run in self.runs if run.name == name]
        return torch.tensor(found, dtype=torch.float64)


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over the first axis and its standard error, which is NaN for one seed.

    >>> mean_and_error(torch.tensor([1.0, 2.0, 3.0]))
    (tensor(2.), tensor(0.5774))
    """
    seeds = len(values)
    error = values.std(0) / math.sqrt(seeds) if seeds > 1 else torch.full_like(values[0], math.nan)
    return values.mean(0), error


def with_error(values: Tensor, *, signed: bool = False) -> str:
    """Return mean and standard error of one number for each seed as text, in percent; of one seed no error.

    >>> with_error(torch.tensor([0.5, 0.6]))
    '55.0 ± 5.0'
    """
    mean, error = (100 * float(value) for value in mean_and_error(values))
    shown = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return shown if math.isnan(error) else f"{shown} ± {error:.1f}"
