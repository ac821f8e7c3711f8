"""What the monitor knows of a layer at a step, and how it is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from biofx.diagnostics.effective import Effective
from biofx.plasticity.bio_module import BioModule

BINS = 16
BINS_PER_UNIT = 8  # a power of two: edges are exact in every floating-point type
HISTOGRAM_EDGES = tuple(place / BINS_PER_UNIT for place in range(BINS + 1))
"""Edges of the histogram of factors, 0 to 2 in steps of 1/8, dimensionless; each bin has its lower edge."""
_CHUNK = 1 << 18  # elements; a chunk's temporaries stay in the cache


@dataclass(frozen=True)
class LayerRecord:
    """One weight at one step. What does not exist, as the factors of a layer without any, is None."""

    synapses: int
    """Elements of the weight, a count."""
    factor_mean: float | None
    """Mean of the learning-rate factors, dimensionless."""
    factor_std: float | None
    """Their standard deviation (of a sample, as ``Tensor.std``), dimensionless; 0 for a single factor."""
    factor_histogram: tuple[int, ...]
    """Factors in each bin of :data:`HISTOGRAM_EDGES`, counts; the first and the last bin also hold what lies
    beyond the edges. Their sum is the number of factors; empty without factors."""
    crystallized: int | None
    """Factors below the monitor's ``crystallized_below``, a count."""
    touched: Mapping[str, int] = field(default_factory=dict)
    """Synapses that each rule touched since the weight's last record, counts, by the rule's name."""
    wrong_signs: int | None = None
    """Synapses whose effective weight has the other sign than their unit, a count; more than 0 is a fault."""
    wrong_signs_raw: int | None = None
    """The same in the parameter, where the graph may yet put it right, a count."""
    excitation: float = math.nan
    """Sum of the positive effective weights, in units of weight."""
    inhibition: float = math.nan
    """Sum of the magnitudes of the negative effective weights, in units of weight."""
    gradient_norm: float | None = None
    """L2 norm of the gradient as it was found, in units of loss per weight."""
    update_norm: float | None = None
    """L2 norm of what the step changed in the weight, in units of weight."""

    @property
    def crystallized_fraction(self) -> float | None:
        """Fraction of the factors that are crystallized, in [0, 1]."""
        return None if self.crystallized is None else self.crystallized / max(1, sum(self.factor_histogram))

    @property
    def replaced(self) -> int:
        """Synapses replaced by rejuvenation since the weight's last record, a count."""
        return self.touched.get("rejuvenate_weights", 0)

    @property
    def ei_ratio(self) -> float:
        """Excitation over inhibition, dimensionless; infinite without inhibition, NaN without either."""
        if self.inhibition:
            return self.excitation / self.inhibition
        return math.inf if self.excitation > 0 else math.nan


@dataclass(frozen=True)
class StepRecord:
    """What the monitor recorded at one step."""

    step: int
    """Number of the step, from 0."""
    layers: Mapping[str, LayerRecord]
    """The weights that took part in the step, by path, in the model's order."""


def short_name(path: str, width: int) -> str:
    """Return a weight's path without ``.weight``, its leading parts cut to a letter until it fits.

    Numbers stay, since they tell one block from the next.

    >>> short_name("encoder.layers.11.attention.query.weight", 24)
    'e.l.11.attention.query'
    >>> short_name("encoder.layers.11.attention.query.weight", 16)
    'e.l.11.a.query'
    """
    parts = path.removesuffix(".weight").split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        parts[place] = part if part.isdigit() else part[:1]
    name = ".".join(parts)
    return name if len(name) <= width else f"…{name[1 - width :]}"


class Sink(Protocol):
    """Takes records as they are made."""

    def write(self, record: StepRecord) -> None:
        """Take one record."""

    def flush(self) -> None:
        """Bring what was taken to where it can be seen."""


@torch.no_grad()
def measure(
    state: BioModule,
    effective: Effective,
    *,
    crystallized_below: float,
    touched: Mapping[str, int],
    gradient_norm: float | None,
    update_norm: float | None,
) -> LayerRecord:
    """Return the record of a weight as it is now; nothing of it is changed.

    Args:
        state: the weight's plasticity state.
        effective: computes the weight that the layer uses.
        crystallized_below: a factor below counts as crystallized, dimensionless.
        touched: as in the record; likewise the norms.
    """
    raw = state.weight.detach()
    used = effective(raw)
    factors, signs = state.acting_factors, effective.count_signs(raw, used)
    return LayerRecord(
        synapses=raw.numel(),
        factor_mean=None if factors is None else factors.float().mean().item(),
        factor_std=None if factors is None else _spread(factors.float()),
        factor_histogram=() if factors is None else _histogram(factors),
        crystallized=None if factors is None else int((factors < crystallized_below).count_nonzero()),
        touched=dict(touched),
        wrong_signs=None if signs is None else signs.wrong,
        wrong_signs_raw=None if signs is None else signs.wrong_raw,
        excitation=_total(used.clamp(min=0)),
        inhibition=_total(used.clamp(max=0).neg_()),
        gradient_norm=gradient_norm,
        update_norm=update_norm,
    )


def _spread(factors: Tensor) -> float:
    return factors.std().item() if factors.numel() > 1 else 0.0


def _total(values: Tensor) -> float:
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).item()


def _histogram(factors: Tensor) -> tuple[int, ...]:
    counts = torch.zeros(BINS, dtype=torch.int64, device=factors.device)
    for chunk in factors.detach().reshape(-1).split(_CHUNK):
        places = (chunk * BINS_PER_UNIT).clamp_(0, BINS - 1).to(torch.uint8)
        counts += torch.bincount(places, minlength=BINS)
    return tuple(counts.tolist())
