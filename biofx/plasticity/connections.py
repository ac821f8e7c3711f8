"""Connections: which pairs of units a weight connects, which of them exist, and how they turn over.

The weights of one connection exist or are missing together: those of all gates of a recurrent layer. Each
element of a convolution's kernel is a connection of its own.

Each unit has as many connections as any other, to within one (as in random networks of fixed in-degree:
Brunel, "Dynamics of sparsely connected networks of excitatory and inhibitory spiking neurons", Journal of
Computational Neuroscience 8, 2000). Weights are multiplied by 1 / √density of their unit, so that the
variance of its input stays: Evci, Ioannou, Keskin, Dauphin, "Gradient flow in sparse neural networks and how
lottery tickets win", AAAI 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from biofx.operators.mask_ops import EXISTS, FORBIDDEN, MISSING
from biofx.plasticity.unit_inputs import rows_of_units, weight_of_rows

Areas: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes of the postsynaptic and of the presynaptic areas, counts."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class ConnectionLayout:
    """How the connections of a layer lie in its weight.

    The weight is ``(gates · out, in / groups, *)``, or ``(in, out / groups, *)`` where ``output_axis`` is 1.
    """

    output_axis: int = 0
    groups: int = 1
    gates: int = 1
    """Weights of one connection, stacked in the rows, a count."""

    def split(self, weight: Tensor) -> Tensor:
        """Return the weights of each connection, ``(gates, units, connections of a unit)``."""
        rows = rows_of_units(weight, output_axis=self.output_axis, groups=self.groups)
        return rows.reshape(self.gates, -1, rows.shape[1])

    def join(self, connections: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`split` for a weight shaped like ``like``; what has no gates is the same for each.

        Args:
            connections: ``(gates, units, connections of a unit)``, or without the first axis.
            like: gives the shape alone.
        """
        each = connections.expand(self.gates, *connections.shape[-2:])
        rows = each.reshape(-1, each.shape[-1])
        return weight_of_rows(rows, like, output_axis=self.output_axis, groups=self.groups)

    def presynaptic(self, shape: torch.Size) -> Tensor:
        """Return the presynaptic unit of each connection, int64, ``(units, connections of a unit)``."""
        axis = 1 - self.output_axis
        units = torch.arange(shape[axis]).reshape(-1, *(1,) * (len(shape) - 1 - axis)).expand(shape)
        if axis == 1 and self.groups > 1:
            group = torch.arange(shape[0]) // (shape[0] // self.groups)
            units = units + group.reshape(-1, *(1,) * (len(shape) - 1)) * shape[1]
        return self.split(units)[0]

    def blocks(self, shape: torch.Size, areas: Areas) -> Tensor:
        """Return which block each connection lies in, int64, ``(units, connections of a unit)``.

        The block of postsynaptic area i and presynaptic area j has the number i · (presynaptic areas) + j.
        """
        post, pre = (
            torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
            for sizes in areas
        )
        return post[:, None] * len(areas[1]) + pre[self.presynaptic(shape)]


# which exist at first


def draw_connections(
    allowed: Tensor, blocks: Tensor | None, densities: Sequence[float], generator: Generator
) -> Tensor:
    """Return which connections exist, bool, ``(units, connections of a unit)``.

    Of each block exactly that share of what is allowed exists, rounded to whole connections, and units have
    equally many in it, to within one. A unit that is left without any but may have some has one.

    Args:
        allowed: which may exist, bool, ``(units, connections of a unit)``.
        blocks: the block of each, int64, of the same shape; None for one block.
        densities: of each block, in [0, 1], dimensionless.
        generator: a CPU generator, the only source of randomness.
    """
    made = torch.zeros_like(allowed)
    for number, density in enumerate(densities):
        inside = allowed if blocks is None else allowed & (blocks == number)
        if density >= 1:
            made |= inside
        elif density > 0:
            made |= _chosen(inside, _counts(inside.sum(1), density, generator), generator)
    alone = ~made.any(1)
    if bool(alone.any()):
        possible = allowed if blocks is None else allowed & (torch.tensor(densities)[blocks] > 0)
        one = _chosen(possible[alone], possible[alone].any(1).long(), generator)
        made[alone] |= one
    return made


def _counts(possible: Tensor, density: float, generator: Generator) -> Tensor:
    """Return how many connections each unit has, given how many are possible, int64, ``(units,)``."""
    wanted = possible.double() * density
    # products of a fraction and a count are a little off
    least = (wanted + 1e-9).floor()
    left = round(float(wanted.sum())) - int(least.sum())
    rest = wanted - least + torch.rand(len(wanted), generator=generator, dtype=torch.float64) * 1e-6
    rest[least >= possible] = -1
    least[rest.topk(max(0, min(left, len(rest)))).indices] += 1
    return least.long().minimum(possible)


def _chosen(possible: Tensor, counts: Tensor, generator: Generator) -> Tensor:
    """Return ``counts`` entries of each row of ``possible``, at random, bool."""
    made = torch.zeros_like(possible)
    step = max(1, _CHUNK // max(1, possible.shape[1]))
    for start in range(0, len(possible), step):
        part = possible[start : start + step]
        order = torch.rand(part.shape, generator=generator).masked_fill_(~part, 2.0).argsort(1)
        first = torch.arange(part.shape[1]) < counts[start : start + step, None]
        made[start : start + step].scatter_(1, order, first)
    return made & possible


def mask_of(exists: Tensor, allowed: Tensor) -> Tensor:
    """Return the values of a mask, float32, shaped like its arguments, which are bool."""
    mask = torch.where(exists, EXISTS, MISSING)
    return torch.where(allowed, mask, FORBIDDEN)


def rescaled(connections: Tensor, exists: Tensor) -> Tensor:
    """Return weights without missing connections, each row times 1 / √(share of its connections that exist).

    Args:
        connections: ``(gates, units, connections of a unit)``.
        exists: bool, ``(units, connections of a unit)``.
    """
    counts = exists.sum(1, keepdim=True).clamp(min=1)
    return torch.where(exists, connections * (exists.shape[1] / counts).sqrt().to(connections), 0)
