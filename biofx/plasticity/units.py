"""A number for each postsynaptic unit, and the synapses that it belongs to."""

from __future__ import annotations

from torch import Tensor


def laid_out(values: Tensor, weight: Tensor, *, output_axis: int = 0, groups: int = 1) -> Tensor:
    """Lay a number per unit out so that it broadcasts to the weight.

    Args:
        values: ``(units,)``.
        weight: ``(out, in / groups, *)``, or ``(in, out / groups, *)`` where ``output_axis`` is 1.
        output_axis: the axis of ``weight`` that counts the units.
        groups: groups of a convolution; a transposed one holds each group's units in rows of their own.
    """
    kernel = (1,) * (weight.dim() - 2)
    if output_axis == 0:
        return values.reshape(-1, *(1,) * (weight.dim() - 1))
    if groups == 1:
        return values.reshape(1, -1, *kernel)
    rows = values.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return rows.reshape(*weight.shape[:2], *kernel)


def summed(synapses: Tensor, *, output_axis: int = 0, groups: int = 1) -> Tensor:
    """Add up what is given for each synapse over the synapses of each unit, shape ``(units,)``.

    Args:
        synapses: shaped like the weight of :func:`laid_out`.
        output_axis: the axis that counts the units.
        groups: groups of a convolution.
    """
    if output_axis == 0:
        return synapses.flatten(1).sum(1)
    columns = synapses.shape[1]
    return synapses.reshape(groups, synapses.shape[0] // groups, columns, -1).sum((1, 3)).flatten()
