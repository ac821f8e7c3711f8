"""Learning-rate factors: one dimensionless number per synapse, scattered around 1.

Source: Hofmann, Becker, Tetzlaff, Mäder, "Concept transfer of synaptic diversity from biological to
artificial neural networks", Nature Communications 16 (2025), doi 10.1038/s41467-025-60078-9, in the
parametrisation of the user guide. ν is the spread.

Deviations: bounds truncate (a draw outside is drawn again) instead of clamping, so that no probability
piles up on a bound; the gamma distribution has mean 1 and standard deviation ν.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from biofx.errors import OptionError
from biofx.operators.blocks import for_each_block


class Distribution(str, Enum):
    """How the learning-rate factors of a layer's synapses are distributed (see ``biofx.plasticity``)."""

    BASELINE = "baseline"
    UNIFORM = "uniform"
    NORMAL = "normal"
    LOGNORMAL = "lognormal"
    GAMMA = "gamma"
    BETA = "beta"
    LAYER_ADAPTIVE = "layer_adaptive"
    WEIGHT_ADAPTIVE = "weight_adaptive"
    TEMPORAL = "temporal"
    ACTIVITY = "activity"


CHANGING = (Distribution.TEMPORAL, Distribution.WEIGHT_ADAPTIVE, Distribution.ACTIVITY)
"""The distributions whose factors can go on changing during training."""
GRANULARITIES = ("element", "neuron", "layer")
INDEPENDENT = (
    *(Distribution.BASELINE, Distribution.UNIFORM, Distribution.NORMAL, Distribution.LOGNORMAL),
    *(Distribution.GAMMA, Distribution.BETA, Distribution.LAYER_ADAPTIVE),
)
"""The distributions that ask nothing of weights or of time, so that factors can be drawn again at any time;
files refer to them by their place."""

_MOST_ROUNDS = 1000
Places: TypeAlias = slice | Tensor
"""Flat positions: a block, or single ones."""
Draw: TypeAlias = Callable[[Places, int, Generator], Tensor]
"""Returns numbers for some places, how many these are, drawn from a generator."""
Take: TypeAlias = Callable[[slice, Tensor], object]
"""Is given a block of flat positions, and the numbers that were drawn for it."""


def _uniform(count: int, nu: float, generator: Generator) -> Tensor:
    """U(1 - ν, 1 + ν)."""
    return symmetric(count, generator).mul_(nu).add_(1)


def _normal(count: int, nu: float, generator: Generator) -> Tensor:
    """N(1, ν²)."""
    return _standard_normal(count, generator).mul_(nu).add_(1)


def _lognormal(count: int, nu: float, generator: Generator) -> Tensor:
    """exp N(-ν²/2, ν²), whose mean is 1."""
    return _standard_normal(count, generator).mul_(nu).sub_(nu**2 / 2).exp_()


def _gamma(count: int, nu: float, generator: Generator) -> Tensor:
    """Gamma(shape 1/ν², rate 1/ν²), whose mean is 1 and whose standard deviation is ν."""
    return _standard_gamma(count, nu**-2, generator) * nu**2


def _beta(count: int, nu: float, generator: Generator) -> Tensor:
    """1 + ν(2B - 1) with B ~ Beta(1/ν, 1/ν), inside [1 - ν, 1 + ν]."""
    first, second = _standard_gamma(count, 1 / nu, generator), _standard_gamma(count, 1 / nu, generator)
    return 1 + nu * (first - second) / (first + second)


_DRAWS: dict[Distribution, Callable[[int, float, Generator], Tensor]] = {
    Distribution.UNIFORM: _uniform,
    Distribution.LAYER_ADAPTIVE: _uniform,
    Distribution.NORMAL: _normal,
    Distribution.LOGNORMAL: _lognormal,
    Distribution.GAMMA: _gamma,
    Distribution.BETA: _beta,
}
STATIC_DISTRIBUTIONS = (Distribution.BASELINE, *_DRAWS, Distribution.WEIGHT_ADAPTIVE)
"""The distributions that are drawn once, before training."""


def draw_factors(
    distribution: Distribution,
    weight: Tensor,
    *,
    nu: float,
    low: float,
    high: float,
    generator: Generator,
    depth: float = 0.0,
) -> Tensor:
    """Draw one factor per element of ``weight``.

    Args:
        distribution: one of :data:`STATIC_DISTRIBUTIONS`.
        weight: any shape; its values matter to ``WEIGHT_ADAPTIVE`` alone.
        nu: spread of the factors around 1, dimensionless.
        low: lower bound of a factor, dimensionless.
        high: upper bound of a factor, dimensionless.
        generator: a CPU generator; the only source of randomness.
        depth: place of the layer in execution order, 0 for the first and 1 for the last;
            ``LAYER_ADAPTIVE`` alone uses it, with a spread of ``nu * (1 - depth / 2)``.

    Returns:
        float32 on the weight's device, shaped like ``weight``, with every element in ``[low, high]``.

    Raises:
        OptionError: the distribution changes during training, or next to nothing of it lies in the bounds.
    """
    if distribution is Distribution.BASELINE or nu == 0:
        return torch.ones_like(weight, dtype=torch.float32, requires_grad=False)
    if distribution is Distribution.WEIGHT_ADAPTIVE:
        draw, what = _adaptive_draw(weight, nu), f"{distribution.value} with nu={nu:g}"
    elif distribution in _DRAWS:
        draw, what = independent_draw(distribution, nu, depth)
    else:
        raise OptionError(
            "expected a distribution that is drawn once "
            f"({', '.join(member.value for member in STATIC_DISTRIBUTIONS)}), "
            f"found {distribution.value!r}, which changes during training"
        )
    factors = truncated(draw, weight.numel(), low, high, what, generator)
    return factors.reshape(weight.shape).to(device=weight.device, dtype=torch.float32)


def _adaptive_draw(weight: Tensor, nu: float) -> Draw:
    spread = nu * _smallness(weight).flatten()

    def draw(places: Places, count: int, own: Generator) -> Tensor:
        return symmetric(count, own).mul_(spread[places]).add_(1)

    return draw


def independent_draw(distribution: Distribution, nu: float, depth: float) -> tuple[Draw, str]:
    """Return how factors of an independent distribution, not the baseline, are drawn, and what it is called.

    Args:
        distribution: one of :data:`biofx.config.INDEPENDENT`, but not the baseline.
        nu: as for :func:`draw_factors`, and so ``depth``.
        depth: likewise.
    """
    spread = nu * (1 - depth / 2) if distribution is Distribution.LAYER_ADAPTIVE else nu

    def draw(places: Places, count: int, own: Generator) -> Tensor:
        return _DRAWS[distribution](count, spread, own)

    return draw, f"{distribution.value} with nu={spread:g}"


def truncated(draw: Draw, count: int, low: float, high: float, what: str, generator: Generator) -> Tensor:
    """Draw ``count`` numbers, and those outside the bounds again until none is; float32 on the CPU.

    Args:
        draw: returns new numbers for the places it is given.
        count: how many.
        low: lower bound.
        high: upper bound.
        what: what an error calls the numbers.
        generator: a CPU generator, the only source of randomness.

    Raises:
        OptionError: next to none of the draws lies in the bounds.
    """
    numbers = torch.empty(count, dtype=torch.float32, device="cpu")
    for_each_truncated(
        draw, count, low, high, what, generator, lambda block, part: numbers[block].copy_(part)
    )
    return numbers


def for_each_truncated(
    draw: Draw, count: int, low: float, high: float, what: str, generator: Generator, take: Take
) -> None:
    """Hand over the numbers that :func:`truncated` would return, block by block, never all at once.

    Args:
        draw: as for :func:`truncated`, and so all up to ``generator``.
        count: likewise.
        low: likewise.
        high: likewise.
        what: likewise.
        generator: likewise.
        take: called once for each block.

    Raises:
        OptionError: next to none of the draws lies in the bounds; some blocks may have been taken.
    """

    def fill(block: slice, own: Generator) -> bool:
        part = draw(block, block.stop - block.start, own)
        for _ in range(_MOST_ROUNDS):
            least, most = part.aminmax()
            if low <= least and most <= high:
                take(block, part)
                return True
            outside = ((part < low) | (part > high)).nonzero().flatten()
            part[outside] = draw(outside + block.start, len(outside), own).to(part.dtype)
        return False

    if not all(for_each_block(count, fill, generator)):
        raise OptionError(
            f"expected bounds that leave room for {what}, found [{low:g}, {high:g}], which it hardly "
            "ever meets; widen fuzzy_lr_min and fuzzy_lr_max"
        )


def _smallness(weight: Tensor) -> Tensor:
    """clip(2 - |w| / mean|w|, ½, 1½): small synapses vary more than large ones."""
    magnitude = weight.detach().to(device="cpu", dtype=torch.float32).abs()
    mean = magnitude.mean()
    relative = magnitude / mean if mean > 0 else torch.ones_like(magnitude)
    return (2 - relative).clamp(0.5, 1.5)


def symmetric(count: int, generator: Generator) -> Tensor:
    """U(-1, 1)."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
    return uniform.mul_(2).sub_(1)


def _standard_normal(count: int, generator: Generator) -> Tensor:
    return torch.randn(count, generator=generator, dtype=torch.float32, device="cpu")


def _standard_gamma(count: int, shape: float, generator: Generator) -> Tensor:
    if not math.isfinite(shape):
        raise OptionError(f"expected a spread nu that a gamma distribution can have, found shape {shape}")
    shapes = torch.full((count,), shape, dtype=torch.float32, device="cpu")
    return torch._standard_gamma(shapes, generator=generator)
