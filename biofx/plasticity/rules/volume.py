"""Volume-dependent plasticity: large synapses are stable, small ones are not.

Source: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025),
doi 10.1038/s41467-025-60078-9; spine volume and its changes: Kasai, Fukuda, Watanabe, Hayashi-Takagi,
Noguchi, "Structural dynamics of dendritic spines in memory and cognition", Trends in Neurosciences 33 (2010).

Deviations: a weight counts as large relative to the mean magnitude of its layer, so that the rule means the
same at any scale of the weights.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from biofx.plasticity.blocks import for_each_block
from biofx.plasticity.normal_table import standard_normal


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
    flat = weight.detach().reshape(-1)
    scale = flat.norm(1).div(max(1, flat.numel())).clamp(min=torch.finfo(weight.dtype).tiny).item()
    factors = torch.empty_like(flat)

    def fill(block: slice, own: Generator) -> None:
        magnitude, part = flat[block].abs(), factors[block]
        torch.div(magnitude, magnitude + scale, out=part).mul_(-stability).exp_()
        if variability:
            noise = standard_normal(len(part), own).mul_(variability).add_(1).abs_()
            part.mul_(noise.to(part))
        if base is not None:
            part.mul_(base)

    for_each_block(flat.numel(), fill, generator)
    return (factors if base is not None else factors.div_(factors.mean())).reshape(weight.shape)
