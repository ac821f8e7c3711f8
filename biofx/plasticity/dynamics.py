"""Factors that go on changing: with time, with the weights, with activity; and how coarse factors are.

Source: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025),
doi 10.1038/s41467-025-60078-9, in the parametrisation of the user guide.

Deviations: temporal factors follow a stationary autoregressive process, so their diversity neither dies nor
grows; the random part of weight- and activity-dependent factors is drawn once and kept.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from biofx.config import Distribution
from biofx.plasticity.distributions import draw_factors, symmetric, truncated

FOLLOWING = (Distribution.WEIGHT_ADAPTIVE, Distribution.ACTIVITY)
"""The distributions whose factors are 1 + ν · c · u, with a random part u and a part c that can change."""


def pooled(weight: Tensor, granularity: str, output_axis: int) -> Tensor:
    """Return mean|w| over the synapses that share a factor: ``weight``'s rank, size 1 along shared axes.

    Args:
        weight: ``(out, in, *)``, or ``(in, out, *)`` where ``output_axis`` is 1.
        granularity: ``"element"`` (a factor per synapse), ``"neuron"`` (per postsynaptic unit), ``"layer"``.
        output_axis: the axis that counts the postsynaptic units.
    """
    magnitude = weight.detach().abs()
    if granularity == "element":
        return magnitude
    kept = output_axis if granularity == "neuron" else None
    return magnitude.mean([axis for axis in range(weight.dim()) if axis != kept], keepdim=True)


def initial_factors(
    distribution: Distribution,
    weight: Tensor,
    *,
    nu: float,
    low: float,
    high: float,
    generator: Generator,
    depth: float = 0.0,
    granularity: str = "element",
    output_axis: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Draw the factors that training starts with.

    Returns:
        The factors, float32, and for distributions that follow weights or activity their random part u.

    Raises:
        OptionError: the bounds leave no room.
    """
    magnitude = pooled(weight, granularity, output_axis)
    if distribution in FOLLOWING and nu:
        noise = (
            symmetric(magnitude.numel(), generator)
            .reshape(magnitude.shape)
            .to(magnitude.device, torch.float32)
        )
        smallness = relative_smallness(magnitude) if distribution is Distribution.WEIGHT_ADAPTIVE else 1.0
        return following_factors(noise, smallness, nu=nu, low=low, high=high, generator=generator), noise
    static = Distribution.NORMAL if distribution is Distribution.TEMPORAL else distribution
    static = Distribution.BASELINE if distribution in FOLLOWING else static
    return draw_factors(static, magnitude, nu=nu, low=low, high=high, generator=generator, depth=depth), None


def relative_smallness(values: Tensor) -> Tensor:
    """Return clip(2 - v / mean v, ½, 1½): small weights, and quiet units, vary more than others."""
    mean = values.mean()
    relative = torch.where(mean > 0, values / mean, torch.ones_like(values))
    return (2 - relative).clamp(0.5, 1.5)


def following_factors(
    noise: Tensor, smallness: Tensor | float, *, nu: float, low: float, high: float, generator: Generator
) -> Tensor:
    """Return 1 + ν · c · u; where that leaves the bounds, u is drawn again, in place."""
    spread = (nu * torch.as_tensor(smallness, device=noise.device)).expand(noise.shape)
    factors = 1 + spread * noise
    outside = ((factors < low) | (factors > high)).flatten().nonzero().flatten()
    if len(outside):
        reach = spread.flatten()[outside].cpu()
        redrawn = truncated(
            lambda places: reach[places] * symmetric(len(places), generator),
            len(outside),
            low - 1,
            high - 1,
            f"factors that vary by up to {float(reach.max()):g}",
        ).to(noise)
        noise.view(-1)[outside] = redrawn / reach.to(noise)
        factors.view(-1)[outside] = 1 + redrawn
    return factors


def evolve(
    factors: Tensor, *, correlation: float, nu: float, low: float, high: float, generator: Generator
) -> None:
    """Let temporal factors take one step, in place: f ← 1 + ρ(f - 1) + √(1 - ρ²) ξ, ξ ~ N(0, ν²).

    The spread of f stays ν: an AR(1) process with a stationary start. Steps that would leave the bounds are
    drawn again.

    Args:
        factors: any shape, dimensionless.
        correlation: ρ, dimensionless, in [0, 1].
        nu: ν, the stationary spread, dimensionless.
        low: lower bound.
        high: upper bound.
        generator: a CPU generator, the only source of randomness.
    """
    step = nu * math.sqrt(1 - correlation**2)
    if step == 0:
        factors.sub_(1).mul_(correlation).add_(1)
        return
    drift = 1 + correlation * (factors.flatten().cpu().double() - 1)

    def draw(places: Tensor) -> Tensor:
        return drift[places] + step * torch.randn(len(places), generator=generator, dtype=torch.float64)

    moved = truncated(draw, factors.numel(), low, high, f"temporal factors with nu={nu:g}")
    factors.copy_(moved.reshape(factors.shape))
