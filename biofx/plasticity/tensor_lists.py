"""Operations on each of several tensors, in one call: what torch's own optimizers step parameters with.

On the CPU a call does for each tensor what the operation on it alone does, to the bit. Shapes, types and
devices may differ within a list.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from biofx.torch_private import foreach_clamp_min, foreach_div, foreach_lerp_, foreach_mul, foreach_zero_

Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


def at_least(tensors: Tensors, least: float) -> Tensors:
    """Return each tensor, with a number in place of the entries below it."""
    return foreach_clamp_min(tensors, least)


def divided(tensors: Tensors, others: Tensors) -> Tensors:
    """Return each tensor over the other in its place."""
    return foreach_div(tensors, others)


def multiplied(tensors: Tensors, others: Tensors) -> Tensors:
    """Return each tensor times the other in its place."""
    return foreach_mul(tensors, others)


def lerp_(tensors: Tensors, ends: Tensors, share: float) -> None:
    """Move each tensor by a share of the way towards its end, in place."""
    foreach_lerp_(tensors, ends, share)


def zero_(tensors: Tensors) -> None:
    """Fill each tensor with zeros; there may be none."""
    if tensors:
        foreach_zero_(tensors)
