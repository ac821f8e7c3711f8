"""Rules that change learning rates: dynamic factors, crystallization, volume-dependent plasticity.

Source of all: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025),
doi 10.1038/s41467-025-60078-9, in the parametrisation of the user guide.

Temporal factors. Deviation: they follow a stationary autoregressive process, so that their diversity neither
dies nor grows. (Factors that follow weights or activity are in :mod:`biofx.operators.rate_sampling`.)

Crystallization (synaptic stabilization): synapses that have settled, or are shaken too hard, become less
plastic. Deviations: a synapse that carries no gradient at all is never caught, so dead units are left alone;
a factor never falls below a floor.

Volume-dependent plasticity: large synapses are stable, small ones are not. Spine volume and its changes:
Kasai, Fukuda, Watanabe, Hayashi-Takagi, Noguchi, "Structural dynamics of dendritic spines in memory and
cognition", Trends in Neurosciences 33 (2010). Deviations: a weight counts as large relative to the mean
magnitude of its layer, so that the rule means the same at any scale of the weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from biofx.operators.dispatch import is_on_host
from biofx.operators.rate_sampling import mean_where
from biofx.operators.sampling import for_each_block, handed_over, mean_over, normal_quantiles, sampled_from

# temporal factors


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
    """Take one step of temporal factors, in place: f ← 1 + ρ(f - 1) + √(1 - ρ²) ξ, ξ ~ N(0, ν²).

    The spread of f stays ν: an AR(1) process with a stationary start. A step that would leave the bounds is
    not taken: the process then is a Metropolis chain, whose stationary law is the normal one truncated to the
    bounds, just as at the start. (Sampling such a step again would push factors away from the bounds.)

    Args:
        factors: any shape, dimensionless.
        correlation: ρ, dimensionless, in [0, 1].
        nu: ν, the stationary spread, dimensionless.
        low: lower bound.
        high: upper bound.
        generator: a CPU generator, the only source of randomness.
        place: flat positions of the factors in a larger tensor, for the step that they would take as its
            part; None if they are the whole tensor.
        total: number of elements of that tensor, a count.
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


# crystallization


@torch.no_grad()
def crystallize(
    weight: Tensor,
    gradient: Tensor,
    factors: Tensor,
    *,
    threshold: float,
    dampening: float,
    floor: float | Tensor,
    mean: float | None = None,
) -> int:
    """Multiply the factors of caught synapses by ``dampening``, in place.

    A synapse is caught when 0 < |g| / |w| < ``threshold``, or |g| > mean|w| of the layer.

    Args:
        weight: any shape.
        gradient: its gradient, unscaled, same shape.
        factors: learning-rate factors, same shape, dimensionless.
        threshold: > 0, in units of gradient per weight.
        dampening: dimensionless, in (0, 1].
        floor: lowest factor, dimensionless, one for all or any shape that broadcasts to the factors; factors
            that start below it stay as they are.
        mean: mean|w| of the layer, where the weight is a part of it only; None to take the weight's.

    Returns:
        How many synapses were caught, a count.
    """
    w, g = weight.detach().reshape(-1), gradient.detach().reshape(-1)
    # a view wherever the memory allows one; under channels_last it does not, and the copy is written back
    flat = factors.reshape(-1)
    floors = floor.expand_as(weight).reshape(-1) if isinstance(floor, Tensor) else None
    if mean is None:
        mean = mean_over(w.numel(), lambda block: w[block].abs().sum(dtype=torch.float32))

    def dampen(block: slice, _: Generator) -> Tensor:
        strength, part = g[block].abs(), flat[block]
        lowest = floor if floors is None else floors[block].to(part)
        # comparisons that make masks cost several times what arithmetic on floats does
        settled = w[block].abs().mul_(threshold).sub_(strength)
        caught = torch.minimum(settled, strength, out=settled)
        caught = torch.maximum(caught, strength.sub_(mean), out=caught).sign_().clamp_(min=0)
        part.lerp_(torch.maximum(part * dampening, part.clamp(max=lowest)), caught.to(part.dtype))
        return caught.sum(dtype=torch.float32)

    counts = for_each_block(w.numel(), dampen)
    if not factors.is_contiguous():
        factors.copy_(flat.view(factors.shape))
    return int(torch.stack(counts).double().sum()) if counts else 0


# volume


@torch.no_grad()
def volume_factors(
    weight: Tensor,
    *,
    base: float | None,
    stability: float,
    variability: float,
    generator: Generator,
    exists: Tensor | None = None,
) -> Tensor:
    """Return ``base`` · exp(-``stability`` · |w| / (|w| + s)) · |N(1, ``variability``²)|, s = mean|w|.

    Args:
        weight: any shape.
        base: factor at zero weight, dimensionless; None normalises the mean of the layer's factors to 1.
        stability: how fast the factor falls with the weight, dimensionless.
        variability: standard deviation of the noise, dimensionless.
        generator: a CPU generator, the only source of randomness.
        exists: where connections exist, bool, shaped like the weight, which is 0 elsewhere; only they count
            in means. None for everywhere.

    Returns:
        Factors shaped like ``weight``, in its dtype and on its device, dimensionless.
    """
    factors = torch.ones_like(weight.detach(), memory_format=torch.contiguous_format)
    options: dict[str, Any] = {"stability": stability, "variability": variability, "generator": generator}
    multiply_by_volume(factors, weight, base=base, exists=exists, **options)
    return factors


@torch.no_grad()
def multiply_by_volume(
    target: Tensor,
    weight: Tensor,
    *,
    base: float | None,
    stability: float,
    variability: float,
    generator: Generator,
    exists: Tensor | None = None,
) -> None:
    """Multiply ``target`` by the factors of :func:`volume_factors`, in place, block by block.

    Args:
        target: shaped like ``weight``, e.g. its gradient.
        weight: as for :func:`volume_factors`, and so all that follows.
        base: see there.
        stability: see there.
        variability: see there.
        generator: see there.
        exists: see there.
    """
    if base is None:
        options: dict[str, Any] = {"stability": stability, "variability": variability, "generator": generator}
        factors = volume_factors(weight, base=1.0, exists=exists, **options)
        mean_factor = factors.mean() if exists is None else mean_where(factors, exists)
        target.mul_(factors.div_(mean_factor).to(target.dtype))
        return
    flat, product = weight.detach().reshape(-1), target.reshape(-1)
    scale = _mean_magnitude(flat, exists, torch.finfo(weight.dtype).tiny)
    options = {"stability": stability, "variability": variability, "generator": generator}
    multiply_blocks_by_volume(product, flat, scale, base=base, **options)
    if product.data_ptr() != target.data_ptr():
        target.copy_(product.view(target.shape))


def multiply_blocks_by_volume(
    product: Tensor,
    flat: Tensor,
    scale: float | Tensor,
    *,
    base: float,
    stability: float,
    variability: float,
    generator: Generator,
    place: slice | None = None,
    total: int | None = None,
) -> None:
    """Multiply numbers by volume-dependent factors, in place, block by block.

    Args:
        product: flat.
        flat: weights, shaped like it.
        scale: mean magnitude of the layer, more than 0.
        base: as for :func:`volume_factors`, and so the next three.
        stability: see there.
        variability: see there.
        generator: see there.
        place: flat positions of these weights in a larger one; None if they are all of it.
        total: elements of that, a count.
    """
    place = slice(0, len(flat)) if place is None else place
    total = len(flat) if total is None else total
    noise = normal_quantiles().mul(variability).add_(1).abs_().mul_(base) if variability else base

    def multiply(block: slice, own: Generator) -> None:
        start, stop = max(block.start, place.start), min(block.stop, place.stop)
        own_part, part = (
            slice(start - place.start, stop - place.start),
            slice(start - block.start, stop - block.start),
        )
        magnitude = flat[own_part].abs()
        # a power of e costs four times what one of 2 does
        factors = magnitude.div_(magnitude + scale).mul_(-stability / math.log(2)).exp2_()
        if isinstance(noise, Tensor):
            drawn = sampled_from(noise, block.stop - block.start, own)[part]
            factors.mul_(handed_over(drawn, factors.device, factors.dtype))
        else:
            factors.mul_(noise)
        product[own_part].mul_(factors.to(product.dtype))

    for_each_block(total, multiply, generator, within=place)


def _mean_magnitude(flat: Tensor, exists: Tensor | None, least: float) -> float | Tensor:
    """Return mean|w| over the connections that exist, at least ``least``; of shape ``()`` on a device."""
    if not is_on_host(flat):
        count = flat.numel() if exists is None else exists.count_nonzero().clamp(min=1)
        return (flat.abs().sum(dtype=torch.float32) / count).clamp(min=least).to(flat.dtype)
    mean = mean_over(flat.numel(), lambda block: flat[block].abs().sum(dtype=torch.float32))
    if exists is not None:
        mean *= flat.numel() / max(1, int(exists.count_nonzero()))
    return max(mean, least)
