"""What the monitor records of a layer at a step, and how it is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from biofx.diagnostics.effective_weight import Effective
from biofx.diagnostics.unit_activity import UnitActivity
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.unit_turnover import DECAY

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
    """Factors that crystallization has brought below the monitor's ``crystallized_below``, a count."""
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
    connections: int | None = None
    """Elements of the weight whose connection exists, a count; None without a mask, where all do."""
    utility: float | None = None
    """Mean of the synapses' running abs(weight · gradient), in units of loss; None where none is kept."""
    unit_utility: float | None = None
    """Mean utility of the units that the weight makes, in units of weight times activity; None where they are
    not turned over, go with those of another layer, or have just begun."""
    unit_age: float | None = None
    """Mean age of these units, in runs of ``rejuvenate_units``."""
    activity: UnitActivity | None = None
    """What the activity of the units says; None where it was not seen."""

    @property
    def weight_magnitude(self) -> float:
        """Mean magnitude of the effective weights whose connection exists, in units of weight."""
        return (self.excitation + self.inhibition) / max(1, self.existing)

    @property
    def replaced_units(self) -> int:
        """Units replaced since the weight's last record, a count."""
        return self.touched.get("rejuvenate_units", 0)

    @property
    def crystallized_fraction(self) -> float | None:
        """Fraction of the factors that are crystallized, in [0, 1]."""
        return None if self.crystallized is None else self.crystallized / max(1, sum(self.factor_histogram))

    @property
    def replaced(self) -> int:
        """Synapses replaced by rejuvenation since the weight's last record, a count."""
        return self.touched.get("rejuvenate_weights", 0)

    @property
    def density(self) -> float | None:
        """Fraction of the connections that exist, in [0, 1]; None without a mask."""
        return None if self.connections is None else self.connections / max(1, self.synapses)

    @property
    def existing(self) -> int:
        """Elements of the weight whose connection exists, all without a mask, a count."""
        return self.synapses if self.connections is None else self.connections

    @property
    def turnover(self) -> float:
        """Fraction of the connections that rejuvenation has moved or replaced since the last record."""
        return self.replaced / max(1, self.existing)

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


@dataclass(frozen=True)
class Thresholds:
    """What a monitor counts; a file has one of each."""

    crystallized_below: float = 0.9
    dormancy: float = 0.1


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


@dataclass(frozen=True)
class FactorStatistics:
    """What is recorded of a weight's learning-rate factors; without any, what a record has then."""

    mean: float | None = None
    std: float | None = None
    histogram: tuple[int, ...] = ()
    below: int = 0
    """Factors below a threshold, a count."""

    @classmethod
    @torch.no_grad()
    def of(cls, factors: Tensor | None, threshold: float) -> FactorStatistics:
        """Return the statistics of factors.

        Args:
            factors: any shape; None for none.
            threshold: dimensionless.
        """
        if factors is None:
            return cls()
        real = factors.float()
        return cls(real.mean().item(), _spread(real), _histogram(factors), _below(factors, threshold))


@torch.no_grad()
def measure(
    state: BioModule,
    effective: Effective,
    *,
    factors: FactorStatistics,
    drawn_below: int,
    touched: Mapping[str, int],
    gradient_norm: float | None,
    update_norm: float | None,
    activity: UnitActivity | None = None,
) -> LayerRecord:
    """Return the record of a weight as it is now; nothing of it is changed.

    Args:
        state: the weight's plasticity state.
        effective: computes the weight that the layer uses.
        factors: of the weight now; those below the threshold count as crystallized,
        drawn_below: but for so many, which are below without crystallization (:func:`drawn_below`).
        touched: as in the record; likewise the norms and the activity.
    """
    raw = state.weight.detach()
    used = effective(raw)
    signs = effective.count_signs(raw, used)
    return LayerRecord(
        synapses=raw.numel(),
        factor_mean=factors.mean,
        factor_std=factors.std,
        factor_histogram=factors.histogram,
        crystallized=None if factors.mean is None else max(0, factors.below - drawn_below),
        touched=dict(touched),
        wrong_signs=None if signs is None else signs.wrong,
        wrong_signs_raw=None if signs is None else signs.wrong_raw,
        excitation=_total(used.clamp(min=0)),
        inhibition=_total(used.clamp(max=0).neg_()),
        gradient_norm=gradient_norm,
        update_norm=update_norm,
        connections=state.connections,
        utility=_mean_utility(state),
        **_of_units(state),
        activity=activity,
    )


@torch.no_grad()
def drawn_below(state: BioModule, threshold: float) -> int:
    """Return how many factors are below a threshold without crystallization, a count.

    Factors that change are kept as they would be without it. Others never rise, so that they are compared
    with what the config draws, or where they are not that, taken as they are.

    Args:
        state: of the weight, whole.
        threshold: dimensionless.
    """
    factors = state.fuzzy_learning_rate_parameters
    if factors is None:
        return 0
    if state.memory.dampening is not None:
        return _below(factors.expand(state.memory.dampening.shape), threshold)
    if state.diversity is not None:
        return _below(state.diversity, threshold)
    drawn = None if state.is_dynamic else state.redrawn()
    if drawn is not None and drawn.shape == factors.shape and bool((factors <= drawn).all()):
        return _below(drawn, threshold)
    return _below(factors, threshold)


def _below(factors: Tensor, threshold: float) -> int:
    return int((factors < threshold).count_nonzero())


def _mean_utility(state: BioModule) -> float | None:
    """Return the mean utility of the synapses that exist, None before any gradient was seen."""
    utility = state.utility
    if utility is None or not utility.numel() or float(utility.flatten()[0]) < 0:
        return None
    return _total(utility) / max(1, utility.numel() if state.connections is None else state.connections)


def _of_units(state: BioModule) -> dict[str, float]:
    """Return what is kept of the units that a weight makes, empty where nothing is."""
    utility, age = state.unit_utility, state.unit_age
    if utility is None or age is None:
        return {}
    found = {"unit_age": age.double().mean().item()}
    grown = age > 0
    if bool(grown.any()):
        average = utility[grown].double() / (1 - DECAY ** age[grown].double())
        found["unit_utility"] = average.mean().item()
    return found


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
