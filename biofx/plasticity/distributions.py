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

import torch
from torch import Generator, Tensor

from biofx.config import Distribution
from biofx.errors import OptionError

_MOST_ROUNDS = 1000
Draw = Callable[[int, float, Generator], Tensor]


def _uniform(count: int, nu: float, generator: Generator) -> Tensor:
    """U(1 - ν, 1 + ν)."""
    return 1 + nu * symmetric(count, generator)


def _normal(count: int, nu: float, generator: Generator) -> Tensor:
    """N(1, ν²)."""
    return 1 + nu * torch.randn(count, generator=generator, dtype=torch.float64)


def _lognormal(count: int, nu: float, generator: Generator) -> Tensor:
    """exp N(-ν²/2, ν²), whose mean is 1."""
    return (nu * torch.randn(count, generator=generator, dtype=torch.float64) - nu**2 / 2).exp()


def _gamma(count: int, nu: float, generator: Generator) -> Tensor:
    """Gamma(shape 1/ν², rate 1/ν²), whose mean is 1 and whose standard deviation is ν."""
    return _standard_gamma(count, nu**-2, generator) * nu**2


def _beta(count: int, nu: float, generator: Generator) -> Tensor:
    """1 + ν(2B - 1) with B ~ Beta(1/ν, 1/ν), inside [1 - ν, 1 + ν]."""
    first, second = _standard_gamma(count, 1 / nu, generator), _standard_gamma(count, 1 / nu, generator)
    return 1 + nu * (first - second) / (first + second)


_DRAWS: dict[Distribution, Draw] = {
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
    if distribution is Distribution.LAYER_ADAPTIVE:
        nu *= 1 - depth / 2
    if distribution is Distribution.WEIGHT_ADAPTIVE:
        spread = nu * _smallness(weight).flatten()

        def draw(places: Tensor) -> Tensor:
            return 1 + spread[places] * symmetric(len(places), generator)

    elif distribution in _DRAWS:

        def draw(places: Tensor) -> Tensor:
            return _DRAWS[distribution](len(places), nu, generator)

    else:
        raise OptionError(
            "expected a distribution that is drawn once "
            f"({', '.join(member.value for member in STATIC_DISTRIBUTIONS)}), "
            f"found {distribution.value!r}, which changes during training"
        )
    factors = truncated(draw, weight.numel(), low, high, f"{distribution.value} with nu={nu:g}")
    return factors.reshape(weight.shape).to(device=weight.device, dtype=torch.float32)


def truncated(draw: Callable[[Tensor], Tensor], count: int, low: float, high: float, what: str) -> Tensor:
    """Draw ``count`` numbers, and those outside the bounds again until none is; float32 on the CPU.

    Args:
        draw: returns new numbers for the places it is given.
        count: how many.
        low: lower bound.
        high: upper bound.
        what: what an error calls the numbers.

    Raises:
        OptionError: next to none of the draws lies in the bounds.
    """
    places = torch.arange(count)
    factors = draw(places).to(torch.float32)
    for _ in range(_MOST_ROUNDS):
        places = ((factors < low) | (factors > high)).nonzero().flatten()
        if not len(places):
            return factors
        factors[places] = draw(places).to(torch.float32)
    raise OptionError(
        f"expected bounds that leave room for {what}, found [{low:g}, {high:g}], which it hardly ever meets; "
        "widen fuzzy_lr_min and fuzzy_lr_max"
    )


def _smallness(weight: Tensor) -> Tensor:
    """clip(2 - |w| / mean|w|, ½, 1½): small synapses vary more than large ones."""
    magnitude = weight.detach().to(device="cpu", dtype=torch.float64).abs()
    mean = magnitude.mean()
    relative = magnitude / mean if mean > 0 else torch.ones_like(magnitude)
    return (2 - relative).clamp(0.5, 1.5)


def symmetric(count: int, generator: Generator) -> Tensor:
    """U(-1, 1)."""
    return 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1


def _standard_gamma(count: int, shape: float, generator: Generator) -> Tensor:
    if not math.isfinite(shape):
        raise OptionError(f"expected a spread nu that a gamma distribution can have, found shape {shape}")
    return torch._standard_gamma(torch.full((count,), shape, dtype=torch.float64), generator=generator)
