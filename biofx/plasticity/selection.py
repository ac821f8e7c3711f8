"""Which weights are replaced: by what they are judged, and how those of little use are chosen.

Each goes with a chance of its own (:mod:`biofx.plasticity.rejuvenation`), or exactly a share of the lowest
go, or all that are at most a fraction of the mean.

Source: Hernandez-Garcia, Dohare, Luo, Sutton, "Reinitializing weights vs units for maintaining plasticity in
neural networks", CoLLAs 2025, arXiv 2508.00212: a proportion, or a threshold relative to the mean, of the
utilities abs(weight · gradient) or abs(weight).

Deviations: of a share that is no whole number of weights, the rest is carried over, where the paper draws
whether one more goes. Of equal utilities, as those of dead units are, it is chance which go. Where all are 0,
none is at most a fraction of the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from biofx.operators.dispatch import is_on_host
from biofx.plasticity.consolidation import in_blocks, is_surely_finite

_SAMPLE = 1 << 16
_SMALLEST = 1e-12
_HALVINGS = 32


@dataclass(frozen=True)
class Utility:
    """How useful the weights of a layer are, in place of their magnitude.

    The chance of a weight of utility u is exp(-d u / r), with r the root mean square of all utilities; or
    with a turnover instead of d, exp(-u / s) with the s at which the mean chance is that turnover.
    """

    values: Tensor
    """Of each weight, not negative, shaped like it."""
    turnover: float | None = None
    """The expected fraction to replace, in (0, 1]; None to follow the protection."""

    def scale(self, judged: Tensor, protection: float) -> float:
        """Return by what utilities are divided in the exponent, 0 if all are 0 or stay.

        Args:
            judged: those that are compared.
            protection: d, dimensionless.
        """
        finite = judged[judged.isfinite()].double()
        largest = float(finite.max()) if len(finite) else 0.0
        if largest == 0:
            return 0.0
        if self.turnover is None:
            return largest * float((finite / largest).square().mean().sqrt()) / protection
        part = finite[:: max(1, len(finite) // _SAMPLE)] / largest
        low, high = math.log(_SMALLEST), -math.log(_SMALLEST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            chance = float((-part / math.exp(middle)).exp().mean())
            low, high = (middle, high) if chance < self.turnover else (low, middle)
        return largest * math.exp(high)

    def start(self, places: Tensor, settled: Tensor) -> None:
        """Give new weights the mean utility of others, so that they are as safe as the average.

        Args:
            places: flat positions of the new weights, int64.
            settled: which are the others, bool, flat.
        """
        others = self.values.reshape(-1)[settled]
        mean = others.mean() if len(others) else self.values.mean()
        self.values.put_(places, mean.expand(len(places)))


def follow_utility(utility: Tensor, weight: Tensor, gradient: Tensor, *, decay: float) -> None:
    """Move a running mean of abs(weight · gradient) on, in place; entries that are not finite are left out.

    Args:
        utility: shaped like ``weight``; its first look is at negative numbers, and takes what it sees.
        weight: real.
        gradient: shaped like ``weight``.
        decay: share of the earlier mean that stays.
    """
    tensors = utility, weight, gradient
    if not is_on_host(utility):  # in one piece, and without waiting for the device
        product = _product(*tensors)
        product = torch.where(product.isfinite(), product, utility.clamp(min=0))
        utility.copy_(torch.where(utility < 0, product, utility.lerp(product, 1 - decay)))
        return
    share = 1.0 if utility.numel() > 0 and float(utility.flatten()[0]) < 0 else 1 - decay
    for block in in_blocks(*tensors):
        mean, product = block[0], _product(*block)
        if not is_surely_finite(product, product):
            product = torch.where(product.isfinite(), product, mean.clamp(min=0))
        mean.lerp_(product, share)


def _product(mean: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    return torch.mul(weight.to(mean.dtype), gradient).abs_()


def judged(weight: Tensor, utility: Utility | None, stays: Tensor | None) -> Tensor:
    """Return what the weights are compared by, shaped like them: of either sign, infinite where one stays.

    Args:
        weight: any shape, floating point.
        utility: what is compared; None for the weights themselves.
        stays: where weights are never replaced, bool, broadcastable to ``weight``; None for nowhere.
    """
    values = weight.detach() if utility is None else utility.values.detach()
    return values if stays is None else values.abs().masked_fill(stays, math.inf)


@dataclass(frozen=True)
class LowestShare:
    """Exactly a share of the weights go, those judged lowest."""

    share: float
    """Of those that may go, in (0, 1]."""
    due: Tensor
    """The fraction of a weight that is carried over, ``()``, float64; changed by :meth:`choose`."""

    def choose(self, judged: Tensor, generator: Generator) -> Tensor:
        """Return the flat positions of those that go, int64, in ascending order.

        Args:
            judged: flat; compared by magnitude, infinite for what stays.
            generator: a CPU generator that decides between equal ones.
        """
        values = judged.abs()
        able = int(values.isfinite().count_nonzero())
        self.due.add_(self.share * able)
        count = min(able, math.floor(float(self.due)))
        self.due.sub_(count)
        if not count:
            return torch.empty(0, dtype=torch.int64, device=values.device)
        highest = values.kthvalue(count).values
        below, equal = ((values < highest).nonzero().flatten(), (values == highest).nonzero().flatten())
        if (missing := count - len(below)) < len(equal):
            order = torch.randperm(len(equal), generator=generator)[:missing]
            equal = equal[order.to(equal.device)]
        return torch.cat((below, equal)).sort().values


@dataclass(frozen=True)
class BelowMean:
    """All weights go that are judged to be at most a fraction of the mean."""

    fraction: float
    """Of the mean of those that may go, dimensionless, >= 0."""

    def choose(self, judged: Tensor, generator: Generator) -> Tensor:
        """Return the flat positions of those that go, int64, in ascending order.

        Args:
            judged: flat; compared by magnitude, infinite for what stays.
            generator: not needed, for nothing is left to chance.
        """
        values = judged.abs()
        finite = values[values.isfinite()]
        mean = float(finite.mean(dtype=torch.float64)) if len(finite) else 0.0
        if mean == 0:
            return torch.empty(0, dtype=torch.int64, device=values.device)
        return (values <= self.fraction * mean).nonzero().flatten()
