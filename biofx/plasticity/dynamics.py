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

from biofx.operators.blocks import for_each_block
from biofx.operators.distributions import Distribution, draw_factors, symmetric, truncated
from biofx.plasticity.moments import put

FOLLOWING = (Distribution.WEIGHT_ADAPTIVE, Distribution.ACTIVITY)
"""The distributions whose factors are 1 + ν · c · u, with a random part u and a part c that can change."""
_LARGEST = 1.5


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
    shared = [axis for axis in range(weight.dim()) if axis != kept]
    return magnitude.mean(shared, keepdim=True) if shared else magnitude


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
            truncated(lambda _, count, own: symmetric(count, own), magnitude.numel(), -1, 1, "u", generator)
            .reshape(magnitude.shape)
            .to(magnitude.device, torch.float32)
        )
        smallness = relative_smallness(magnitude) if distribution is Distribution.WEIGHT_ADAPTIVE else 1.0
        return following_factors(noise, smallness, nu=nu, low=low, high=high, generator=generator), noise
    static = Distribution.NORMAL if distribution is Distribution.TEMPORAL else distribution
    static = Distribution.BASELINE if distribution in FOLLOWING else static
    return draw_factors(static, magnitude, nu=nu, low=low, high=high, generator=generator, depth=depth), None


def most_spread(nu: float) -> float:
    """Return how far factors that follow can be from 1 at the most, dimensionless."""
    return _LARGEST * nu


def relative_smallness(values: Tensor) -> Tensor:
    """Return clip(2 - v / mean v, ½, 1½): small weights, and quiet units, vary more than others."""
    mean = values.mean()
    relative = torch.where(mean > 0, values / mean, torch.ones_like(values))
    return (2 - relative).clamp(0.5, _LARGEST)


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
            lambda places, count, own: symmetric(count, own).mul_(reach[places]),
            len(outside),
            low - 1,
            high - 1,
            f"factors that vary by up to {float(reach.max()):g}",
            generator,
        ).to(noise)
        put(noise, outside, redrawn / reach.to(noise))
        put(factors, outside, 1 + redrawn)
    return factors


def evolve(
    factors: Tensor,
    *,
    correlation: float,
    nu: float,
    low: float,
    high: float,
    generator: Generator,
    place: slice | None = None,
    total: int | None = None,
) -> None:
    """Let temporal factors take one step, in place: f ← 1 + ρ(f - 1) + √(1 - ρ²) ξ, ξ ~ N(0, ν²).

    The spread of f stays ν: an AR(1) process with a stationary start. A step that would leave the bounds is
    not taken: the process then is a Metropolis chain, whose stationary law is the normal one truncated to the
    bounds, just as it starts. (To draw such a step again would push factors away from the bounds.)

    Args:
        factors: any shape, dimensionless.
        correlation: ρ, dimensionless, in [0, 1].
        nu: ν, the stationary spread, dimensionless.
        low: lower bound.
        high: upper bound.
        generator: a CPU generator, the only source of randomness.
        place: where the factors lie in a larger tensor, flattened, of which they are to take the step that
            they would take as its part; None if they are all there is.
        total: how many elements that tensor has, a count.
    """
    step = nu * math.sqrt(1 - correlation**2)
    if step == 0:
        return
    moved = factors.flatten().cpu().float()

    place = slice(0, len(moved)) if place is None else place
    total = len(moved) if total is None else total

    def move(block: slice, own: Generator) -> None:
        start, stop = max(block.start, place.start), min(block.stop, place.stop)
        part = moved[start - place.start : stop - place.start]
        drawn = torch.randn(block.stop - block.start, generator=own)
        proposed = drawn[start - block.start : stop - block.start].mul_(step).add_(1)
        proposed.add_(part - 1, alpha=correlation)
        torch.where((proposed < low) | (proposed > high), part, proposed, out=part)

    for_each_block(total, move, generator, within=place)
    factors.copy_(moved.reshape(factors.shape))
