"""Crystallization: synapses that have settled, or are shaken too hard, become less plastic.

Source: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025),
doi 10.1038/s41467-025-60078-9 (synaptic stabilization).

Deviations: a synapse that carries no gradient at all is never caught, so dead units are left alone; a
factor never falls below a floor.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from biofx.operators.blocks import for_each_block, mean_over


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
