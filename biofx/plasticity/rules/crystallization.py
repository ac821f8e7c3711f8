"""Crystallization: synapses that have settled, or are shaken too hard, become less plastic.

Source: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025),
doi 10.1038/s41467-025-60078-9 (synaptic stabilization).

Deviations: a synapse that carries no gradient at all is never caught, so dead units are left alone; a
factor never falls below a floor.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from biofx.plasticity.blocks import for_each_block


@torch.no_grad()
def crystallize(
    weight: Tensor,
    gradient: Tensor,
    factors: Tensor,
    *,
    threshold: float,
    dampening: float,
    floor: float,
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
        floor: lowest factor, dimensionless; factors that start below it stay as they are.
        mean: mean|w| of the layer, where the weight is a part of it only; None to take the weight's.

    Returns:
        How many synapses were caught, a count.
    """
    w, g = weight.detach().reshape(-1), gradient.detach().reshape(-1)
    # a view wherever the memory allows one; under channels_last it does not, and the copy is written back
    flat = factors.reshape(-1)
    if mean is None:
        mean = (w.norm(1) / max(1, w.numel())).item()

    def dampen(block: slice, _: Generator) -> int:
        strength, part = g[block].abs(), flat[block]
        # comparisons that make masks cost several times what arithmetic on floats does
        settled = w[block].abs().mul_(threshold).sub_(strength).sign_().mul_(strength.sign()).clamp_(min=0)
        caught = strength.sub_(mean).sign_().clamp_(min=0).maximum(settled)
        count = caught.sum().item()
        if math.isnan(count):
            count = caught.nan_to_num_(0.0).sum().item()
        if count:
            part.lerp_(torch.maximum(part * dampening, part.clamp(max=floor)), caught.to(part.dtype))
        return int(count)

    caught = sum(for_each_block(w.numel(), dampen))
    if not factors.is_contiguous():
        factors.copy_(flat.view(factors.shape))
    return caught
