"""What the synapses of a unit add up to: synaptic scaling maintains it, and initial weights are balanced.

A weight is ``(out, in / groups, *)``, or ``(in, out / groups, *)`` where its ``output_axis`` is 1. A
transposed convolution with groups holds the units of each group in rows of their own.

Synaptic scaling: a neuron multiplies all its inputs so that their total, or its activity, stays put. Source:
Turrigiano, Leslie, Desai, Rutherford, Nelson, "Activity-dependent scaling of quantal amplitude in neocortical
neurons", Nature 391 (1998); van Rossum, Bi, Turrigiano, "Stable Hebbian learning from spike timing-dependent
plasticity", Journal of Neuroscience 20 (2000), the multiplicative form.

Balance: initial weights that keep a deep network alive although every unit has one sign. If each postsynaptic
unit takes more excitation than inhibition, or the reverse, all units of a layer follow one common drive, and
after a few layers they are all alike. So excitation and inhibition are balanced at each unit, and connections
are sparse, which makes what units have in common small against what is their own. Source: van Vreeswijk,
Sompolinsky, "Chaos in neuronal networks with balanced excitatory and inhibitory activity", Science 274
(1996); the loss of rank under Dale's principle, Li et al., "Learning better with Dale's law: a spectral
perspective", NeurIPS 2023; variance of rectified units, He et al., ICCV 2015.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

DENSITY = 0.1
"""Fraction of the synapses that a balanced unit starts with, dimensionless."""
FEWEST = 16
"""Synapses that a balanced unit starts with at least, where it has that many, a count."""
_RECTIFIED = 1 / (1 - 1 / math.pi)
"""E[a²] / Var[a] of a rectified normal variable: balance removes its mean, and this makes up for it."""


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
    weight.mul_(broadcast_units(multiplier, weight, output_axis=output_axis, groups=groups).to(weight))
    return multiplier


def input_strength(weight: Tensor, *, output_axis: int = 0, groups: int = 1) -> Tensor:
    """Return Σ_i |w_ji| for each neuron j, shape ``(out,)``, in units of weight."""
    return sum_units(weight.detach().abs(), output_axis=output_axis, groups=groups)


# balance


@torch.no_grad()
def balanced(weight: Tensor, signs: Tensor, generator: Generator, *, rectified: bool = True) -> Tensor:
    """Return weights of the given signs, sparse, and in balance for each row.

    Magnitudes are those of ``weight``, scaled so that excitation and inhibition of a row add up to 0 and that
    its postsynaptic unit varies as much as it did. A row whose units are all of one sign cannot be balanced
    and keeps all its magnitudes.

    Args:
        weight: ``(rows, synapses)``.
        signs: +1, -1, or 0 for synapses that are free and stay as they are; shaped like ``weight``.
        generator: a CPU generator, the only source of randomness.
        rectified: whether the presynaptic activity is that of rectified units, so not negative.
    """
    mirrored, constrained = weight.abs() * signs, signs != 0
    density = min(1.0, max(DENSITY, FEWEST / max(1, int(constrained.sum(1).max()))))
    chosen = (torch.rand(weight.shape, generator=generator) < density).to(weight.device)
    made, balances = _balanced(torch.where(chosen, mirrored, 0.0))
    if not balances.all():  # too few synapses are left of both signs: all of them, or those of one
        dense, dense_balances = _balanced(mirrored)
        made = torch.where(balances, made, torch.where(dense_balances, dense, mirrored))
        balances |= dense_balances
    are_free = not constrained.all()
    before = (weight * constrained if are_free else weight).square().sum(1, keepdim=True)
    after = made.square().sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    scale = (before * (_RECTIFIED if rectified else 1.0) / after).sqrt()
    scaled = made * torch.where(balances, scale, 1.0)
    return torch.where(constrained, scaled, weight) if are_free else scaled


def balanced_weight(
    weight: Tensor, signs: Tensor, generator: Generator, *, output_axis: int, groups: int, rectified: bool
) -> Tensor:
    """Return :func:`balanced` weights in the layout of a layer.

    Args:
        weight: ``(out, in / groups, *)``, or ``(in, out / groups, *)`` where ``output_axis`` is 1.
        signs: broadcastable to it; +1, -1, or 0 for synapses that are free.
        generator: a CPU generator, the only source of randomness.
        output_axis: the axis of ``weight`` that counts the postsynaptic units.
        groups: groups of a convolution, a count.
        rectified: as in :func:`balanced`.
    """
    rows = rows_of_units(weight, output_axis=output_axis, groups=groups)
    of_rows = rows_of_units(signs.expand_as(weight), output_axis=output_axis, groups=groups)
    made = balanced(rows, of_rows, generator, rectified=rectified)
    return weight_of_rows(made, weight, output_axis=output_axis, groups=groups)


def _balanced(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights with excitation and inhibition of each row scaled to 1 in sum, and which rows have both.

    Rows that have not are arbitrary.
    """
    excitation, inhibition = weight.clamp(min=0), weight.clamp(max=0)
    totals = excitation.sum(1, keepdim=True), -inhibition.sum(1, keepdim=True)
    balances = (totals[0] > 0) & (totals[1] > 0) & totals[0].isfinite() & totals[1].isfinite()
    excitation /= totals[0].clamp(min=1e-30)
    inhibition /= totals[1].clamp(min=1e-30)
    return excitation.add_(inhibition), balances


# layout


def broadcast_units(values: Tensor, weight: Tensor, *, output_axis: int = 0, groups: int = 1) -> Tensor:
    """Return a number per unit, ``(units,)``, in a shape that broadcasts to the weight."""
    kernel = (1,) * (weight.dim() - 2)
    if output_axis == 0:
        return values.reshape(-1, *(1,) * (weight.dim() - 1))
    if groups == 1:
        return values.reshape(1, -1, *kernel)
    rows = values.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return rows.reshape(*weight.shape[:2], *kernel)


def sum_units(synapses: Tensor, *, output_axis: int = 0, groups: int = 1) -> Tensor:
    """Return the sum over the synapses of each unit, ``(units,)``, of numbers shaped like the weight."""
    if output_axis == 0:
        return synapses.flatten(1).sum(1)
    columns = synapses.shape[1]
    return synapses.reshape(groups, synapses.shape[0] // groups, columns, -1).sum((1, 3)).flatten()


def rows_of_units(weight: Tensor, *, output_axis: int = 0, groups: int = 1) -> Tensor:
    """Return the weight as ``(units, synapses)``."""
    if output_axis == 0:
        return weight.reshape(len(weight), -1)
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def weight_of_rows(rows: Tensor, like: Tensor, *, output_axis: int = 0, groups: int = 1) -> Tensor:
    """Undo :func:`rows_of_units` for a weight shaped like ``like``."""
    if output_axis == 0:
        return rows.reshape(like.shape)
    grouped = rows.reshape(groups, like.shape[1], like.shape[0] // groups, -1)
    return grouped.transpose(1, 2).reshape(like.shape)


def index_of_units(
    units: Tensor, weight: Tensor, *, output_axis: int = 0, groups: int = 1
) -> tuple[Tensor, ...]:
    """Return where the synapses of some units are in a weight: indexing gives ``(units, synapses, *kernel)``.

    Args:
        units: which, int64, ``(count,)``; on the weight's device.
        weight: ``(out, in / groups, *)``, or ``(in, out / groups, *)`` where ``output_axis`` is 1.
        output_axis: the axis of ``weight`` that counts the units.
        groups: groups of a convolution, a count.
    """
    if output_axis == 0:
        return (units,)
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    group = torch.div(units, columns, rounding_mode="floor")
    return group[:, None] * rows + torch.arange(rows, device=units.device), (units % columns)[:, None]
