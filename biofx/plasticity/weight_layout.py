"""How a weight holds the synapses of its postsynaptic units, and how to write to single synapses.

A weight is ``(out, in / groups, *)``, or ``(in, out / groups, *)`` where its ``output_axis`` is 1. A
transposed convolution with groups holds the units of each group in rows of their own.
"""

from __future__ import annotations

from torch import Tensor


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


def write_flat(tensor: Tensor, places: Tensor, values: Tensor) -> None:
    """Write values to flat positions of a tensor, in place, in any memory format.

    Args:
        tensor: any shape and memory format.
        places: flat positions, int64.
        values: one for each place, or one for all.
    """
    if tensor.is_contiguous():  # many times faster
        tensor.view(-1).scatter_(0, places, values.expand(len(places)))
    else:
        tensor.put_(places, values.expand(len(places)))
