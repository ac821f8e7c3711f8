"""Volume-dependent plasticity: large synapses are stable, small ones are not.

Source: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025),
doi 10.1038/s41467-025-60078-9; spine volume and its changes: Kasai, Fukuda, Watanabe, Hayashi-Takagi,
Noguchi, "Structural dynamics of dendritic spines in memory and cognition", Trends in Neurosciences 33 (2010).

Deviations: a weight counts as large relative to the mean magnitude of its layer, so that the rule means the
same at any scale of the weights.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from biofx.operators.blocks import for_each_block, mean_over
from biofx.operators.levels import drawn_from, normal_quantiles


@torch.no_grad()
def volume_factors(
    weight: Tensor, *, base: float | None, stability: float, variability: float, generator: Generator
) -> Tensor:
    """Return ``base`` · exp(-``stability`` · |w| / (|w| + s)) · |N(1, ``variability``²)|, s = mean|w|.

    Args:
        weight: any shape.
        base: factor at zero weight, dimensionless; None normalises the mean of the layer's factors to 1.
        stability: how fast the factor falls with the weight, dimensionless.
        variability: standard deviation of the noise, dimensionless.
        generator: a CPU generator, the only source of randomness.

    Returns:
        Factors shaped like ``weight``, in its dtype and on its device, dimensionless.
    """
    factors = torch.ones_like(weight.detach(), memory_format=torch.contiguous_format)
    multiply_by_volume(
        factors,
        weight,
        base=1.0 if base is None else base,
        stability=stability,
        variability=variability,
        generator=generator,
    )
    return factors if base is not None else factors.div_(factors.mean())


@torch.no_grad()
def multiply_by_volume(
    target: Tensor,
    weight: Tensor,
    *,
    base: float,
    stability: float,
    variability: float,
    generator: Generator,
) -> None:
    """Multiply ``target`` by what :func:`volume_factors` draws, in place, without ever holding all of it.

    Args:
        target: shaped like ``weight``, e.g. its gradient.
        weight: any shape.
        base: factor at zero weight, dimensionless.
        stability: how fast the factor falls with the weight, dimensionless.
        variability: standard deviation of the noise, dimensionless.
        generator: a CPU generator, the only source of randomness.
    """
    flat, product = weight.detach().reshape(-1), target.reshape(-1)
    mean = mean_over(flat.numel(), lambda block: flat[block].abs().sum(dtype=torch.float32))
    scale = max(mean, torch.finfo(weight.dtype).tiny)
    noise = normal_quantiles().mul(variability).add_(1).abs_().mul_(base) if variability else base

    def multiply(block: slice, own: Generator) -> None:
        magnitude = flat[block].abs()
        # a power of e costs four times what one of 2 does
        factors = magnitude.div_(magnitude + scale).mul_(-stability / math.log(2)).exp2_()
        drawn = drawn_from(noise, len(factors), own).to(factors) if isinstance(noise, Tensor) else noise
        product[block].mul_(factors.mul_(drawn).to(product.dtype))

    for_each_block(flat.numel(), multiply, generator)
    if product.data_ptr() != target.data_ptr():
        target.copy_(product.view(target.shape))
