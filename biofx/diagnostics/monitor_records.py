"""What the monitor records of a layer at a step, and how it is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from biofx.diagnostics.check_signs import SignCount, count_signs, laid_out_signs, wrong_signs
from biofx.layers.constant_part import ConstantPart, Treatment, WeightUse, weight_uses
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
    connections: int | None = None
    """Elements of the weight whose connection exists, a count; None without a mask, where all do."""

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
        connections=state.connections,
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


def effective_weights(graph_module: GraphModule, states: Mapping[str, BioModule]) -> dict[str, Effective]:
    """Return how each weight of ``states`` becomes the one that its layer uses, by path."""
    constants = ConstantPart(graph_module)
    uses: dict[int, list[WeightUse]] = {}
    for use in weight_uses(constants):
        uses.setdefault(id(use.parameter), []).append(use)
    return {
        path: Effective(state, constants, uses.get(id(state.parameter), [])) for path, state in states.items()
    }


class Effective:
    """Computes from a parameter the weight that its layer uses, of the same shape, and counts its signs.

    Of a weight that is used in several ways, the first one that is constrained as a whole is meant, or
    else the first one.
    """

    def __init__(self, state: BioModule, constants: ConstantPart, uses: list[WeightUse]) -> None:
        self._state, self._constants, self._uses = state, constants, uses
        signed = [use for use in uses if use.constraints]
        whole = [use for use in signed if use.before is Treatment.NOTHING]
        self._use = next(iter(whole or uses), None)
        self._constraints = list(dict.fromkeys(node for use in signed for node in use.constraints))
        self._is_whole = bool(whole) and len(self._constraints) == 1

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses where the parameter is ``weight``.

        Where the graph slices or folds the weight afterwards, the weight before that is returned.

        Raises:
            InvariantError: the graph's expression cannot be computed.
        """
        if self._use is None:
            return weight
        used: Tensor = self._constants.value(self._use.whole, self._given(weight))
        return used

    def count_signs(self, weight: Tensor, used: Tensor) -> SignCount | None:
        """Count the synapses with a sign, None where there are none.

        The signs are those of the graph's constraints, or of the state where the graph has none.

        Args:
            weight: the parameter.
            used: what :meth:`__call__` made of it.

        Raises:
            InvariantError: the signs cannot be computed, or do not fit.
        """
        if not self._constraints:
            signs = self._state.signs()
        elif self._is_whole:
            signs = laid_out_signs(self._constants, self._constraints[0], weight)
        else:
            given = self._given(weight)
            counts = [
                count_signs(
                    self._constants, node, [use for use in self._uses if node in use.constraints], given
                )
                for node in self._constraints
            ]
            return sum(counts, SignCount())
        if signs is None:
            return None
        return SignCount(used.numel(), wrong_signs(used, signs), wrong_signs(weight, signs))

    def _given(self, weight: Tensor) -> dict[Node, Any]:
        if self._use is None:
            return {}
        return dict.fromkeys(self._constants.roots(self._use.parameter), weight)
