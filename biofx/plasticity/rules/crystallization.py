"""Crystallization: synapses that have settled, or are shaken too hard, become less plastic.

Source: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025),
doi 10.1038/s41467-025-60078-9 (synaptic stabilization).

Deviations: a synapse that carries no gradient at all is never caught, so dead units are left alone; a
factor never falls below a floor.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements; a chunk's temporaries stay in the cache


@torch.no_grad()
def crystallize(
    weight: Tensor,
    gradient: Tensor,
    factors: Tensor,
    *,
    threshold: float,
    dampening: float,
    floor: float,
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

    Returns:
        How many synapses were caught, a count.
    """
    mean = (weight.detach().norm(1) / max(1, weight.numel())).item()
    caught = 0
    parts = (tensor.detach().reshape(-1).split(_CHUNK) for tensor in (weight, gradient))
    for w, g, f in zip(*parts, factors.view(-1).split(_CHUNK), strict=True):
        strength = g.abs()
        settled = (strength < w.abs().mul_(threshold)) & (strength > 0)
        places = (settled | (strength > mean)).nonzero().flatten()
        if len(places):
            old = f[places]
            f[places] = torch.maximum(old * dampening, old.clamp(max=floor))
            caught += len(places)
    return caught
