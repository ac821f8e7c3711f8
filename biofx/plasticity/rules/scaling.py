"""Synaptic scaling: a neuron multiplies all its inputs so that their total, or its activity, stays put.

Source: Turrigiano, Leslie, Desai, Rutherford, Nelson, "Activity-dependent scaling of quantal amplitude in
neocortical neurons", Nature 391 (1998); van Rossum, Bi, Turrigiano, "Stable Hebbian learning from spike
timing-dependent plasticity", Journal of Neuroscience 20 (2000), the multiplicative form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biofx.plasticity.units import laid_out, summed


@torch.no_grad()
def synaptic_scaling(
    weight: Tensor, target: Tensor, *, rate: float, output_axis: int = 0, groups: int = 1
) -> Tensor:
    """Move the total input strength of each neuron towards its target, in place.

    w_ji ← w_ji · (1 + ``rate`` · (T_j / Σ_i |w_ji| - 1)): ratios between a neuron's synapses stay.

    Args:
        weight: ``(out, in, *)``.
        target: T, total strength per neuron, ``(out,)``, in units of weight.
        rate: how much of the way to go, dimensionless, in (0, 1].
        output_axis: the axis of ``weight`` that counts the neurons.
        groups: groups of a convolution.

    Returns:
        The multiplier of each neuron, ``(out,)``, dimensionless; 1 for a neuron without input.
    """
    total = input_strength(weight, output_axis=output_axis, groups=groups)
    multiplier = torch.where(total > 0, 1 + rate * (target / total - 1), torch.ones_like(total))
    weight.mul_(laid_out(multiplier, weight, output_axis=output_axis, groups=groups).to(weight))
    return multiplier


def input_strength(weight: Tensor, *, output_axis: int = 0, groups: int = 1) -> Tensor:
    """Return Σ_i |w_ji| for each neuron j, shape ``(out,)``, in units of weight."""
    return summed(weight.detach().abs(), output_axis=output_axis, groups=groups)
