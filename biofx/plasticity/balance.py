"""Weights to begin with that keep a deep network alive although every unit has one sign.

If each postsynaptic unit takes more excitation than inhibition, or the reverse, all units of a layer follow
one common drive, and after a few layers they all say the same. So excitation and inhibition are balanced at
each unit, and connections are sparse: what is common to all units then is small against what is their own.

Source: balance, van Vreeswijk, Sompolinsky, "Chaos in neuronal networks with balanced excitatory and
inhibitory activity", Science 274 (1996); the loss of rank under Dale's principle, Li et al., "Learning better
with Dale's law: a spectral perspective", NeurIPS 2023; variance of rectified units, He et al., ICCV 2015.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

DENSITY = 0.1
"""Fraction of the synapses that a unit begins with, dimensionless."""
FEWEST = 16
"""Synapses that a unit begins with at least, where it has that many, a count."""
_RECTIFIED = 1 / (1 - 1 / math.pi)
"""E[a²] / Var[a] of a rectified normal variable: balance takes its mean away, and this makes up for it."""


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
    magnitude, constrained = weight.abs(), signs != 0
    density = min(1.0, max(DENSITY, FEWEST / max(1, int(constrained.sum(1).max()))))
    chosen = (torch.rand(weight.shape, generator=generator) < density).to(weight.device)
    sparse = _balanced(magnitude * chosen, signs)
    dense = _balanced(magnitude, signs)
    mirrored = magnitude * signs
    made = torch.where(_balances(sparse), sparse, torch.where(_balances(dense), dense, mirrored))
    before = (weight * constrained).square().sum(1, keepdim=True) * (_RECTIFIED if rectified else 1.0)
    after = made.square().sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    scaled = torch.where(_balances(made), made * (before / after).sqrt(), made)
    return torch.where(constrained, scaled, weight)


def balanced_weight(
    weight: Tensor, signs: Tensor, generator: Generator, *, transposed: bool, groups: int, rectified: bool
) -> Tensor:
    """Do the same with a layer's weight.

    Args:
        weight: ``(out, in / groups, *)``, or ``(in, out / groups, *)`` where ``transposed``.
        signs: broadcastable to it; +1, -1, or 0 for synapses that are free.
        generator: a CPU generator, the only source of randomness.
        transposed: whether it is that of a transposed convolution.
        groups: groups of a convolution, a count.
        rectified: as in :func:`balanced`.
    """
    rows = rows_first(weight, transposed=transposed, groups=groups)
    laid_out = rows_first(signs.expand_as(weight), transposed=transposed, groups=groups)
    made = balanced(rows, laid_out, generator, rectified=rectified)
    return rows_back(made, weight, transposed=transposed, groups=groups)


def _balanced(magnitude: Tensor, signs: Tensor) -> Tensor:
    """Return excitation and inhibition of each row scaled to a sum of 1 each; 0 where one is missing."""
    excitation, inhibition = magnitude * (signs > 0), magnitude * (signs < 0)
    totals = excitation.sum(1, keepdim=True), inhibition.sum(1, keepdim=True)
    both = (totals[0] > 0) & (totals[1] > 0)
    made = excitation / totals[0].clamp(min=1e-30) - inhibition / totals[1].clamp(min=1e-30)
    return torch.where(both, made, 0.0)


def _balances(rows: Tensor) -> Tensor:
    """Return whether each row has synapses of both signs, ``(rows, 1)``."""
    return (rows > 0).any(1, keepdim=True) & (rows < 0).any(1, keepdim=True)


def rows_first(weight: Tensor, *, transposed: bool, groups: int) -> Tensor:
    """Lay a layer's weight out as ``(postsynaptic units, synapses)``."""
    if not transposed:
        return weight.reshape(len(weight), -1)
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def rows_back(table: Tensor, weight: Tensor, *, transposed: bool, groups: int) -> Tensor:
    """Undo :func:`rows_first`; the result is shaped like ``weight``."""
    if not transposed:
        return table.reshape(weight.shape)
    grouped = table.reshape(groups, weight.shape[1], weight.shape[0] // groups, -1)
    return grouped.transpose(1, 2).reshape(weight.shape)
