"""What graphs call for split weights: sums over the synapses of a connection, in activations or in weights.

Synapses are neighbouring output channels of a layer, or *sub-weights*, which are added up to its weight. Of
neighbours, a *compact* tensor holds one channel per connection; the *full* one gives each of the ``gamma``
neighbouring members the same value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from biofx.errors import InputError, OptionError
from biofx.operators.dispatch import held_back, is_plain_eager, is_recorded, overridable
from biofx.operators.exclusive import is_exclusive
from biofx.operators.gradient_memory import forget_memory, is_large, last_memory, remember_memory
from biofx.operators.sub_weight_sum import added_up

SPLITTING_MODES = ("neighbours", "sub-weights")
"""What the synapses of a connection are."""
SPLITTING_RATES = ("sum", "mean")
"""How large a step they take together."""


@overridable
def pool_synapses(x: Tensor, *, gamma: int, channel_axis: int) -> Tensor:
    """Sum groups of ``gamma`` neighbouring channels and give each member the sum.

    Args:
        x: a layer's output; its size along ``channel_axis`` is a multiple of ``gamma``.
        gamma: synapses per connection, a count.
        channel_axis: counted from the end, so that batched and unbatched inputs agree.

    Returns:
        A tensor shaped like ``x``; samples of a batch do not mix.

    >>> pool_synapses(torch.tensor([1.0, 2.0, 10.0, 20.0]), gamma=2, channel_axis=-1).tolist()
    [3.0, 3.0, 30.0, 30.0]
    """
    if x.shape[channel_axis] % gamma:
        raise OptionError(
            f"pool_synapses expected the size of axis {channel_axis} to be a multiple of gamma={gamma}, "
            f"found shape {tuple(x.shape)}; choose a gamma that divides the layer's output channels, "
            "and an activation that keeps the shape"
        )
    grouped: Tensor = x.unflatten(channel_axis, (-1, gamma))
    member_axis = channel_axis if channel_axis < 0 else channel_axis + 1
    summed = grouped.sum(member_axis, keepdim=True)
    first = channel_axis - 1 if channel_axis < 0 else channel_axis
    # a single group would stay a view whose members share memory: not to be viewed, nor changed in place
    return summed.expand_as(grouped).flatten(first, member_axis).contiguous()


@overridable
def sum_synapses(x: Tensor, *, gamma: int, channel_axis: int) -> Tensor:
    """Sum groups of ``gamma`` neighbouring channels: what :func:`pool_synapses` gives each member.

    Args:
        x: its size along ``channel_axis`` is a multiple of ``gamma``.
        gamma: synapses per connection, a count.
        channel_axis: counted from the end.

    >>> sum_synapses(torch.tensor([1.0, 2.0, 10.0, 20.0]), gamma=2, channel_axis=-1).tolist()
    [3.0, 30.0]
    """
    if x.shape[channel_axis] % gamma:
        raise OptionError(
            f"sum_synapses expected the size of axis {channel_axis} to be a multiple of gamma={gamma}, "
            f"found shape {tuple(x.shape)}"
        )
    grouped: Tensor = x.unflatten(channel_axis, (-1, gamma))
    return grouped.sum(channel_axis if channel_axis < 0 else channel_axis + 1)


@overridable
def spread_synapses(x: Tensor, *, gamma: int, channel_axis: int, groups: int) -> Tensor:
    """Give each of the ``gamma`` members of a connection its value: a compact tensor becomes the full one.

    Args:
        x: compact; its size along ``channel_axis`` is a multiple of ``groups``.
        gamma: synapses per connection, a count.
        channel_axis: counted from the end.
        groups: connections, a count; what one holds (more than one value behind a flatten) stays together.

    >>> spread_synapses(torch.tensor([1, 2, 3, 4]), gamma=2, channel_axis=-1, groups=2).tolist()
    [1, 2, 1, 2, 3, 4, 3, 4]
    """
    grouped = x.unflatten(channel_axis, (groups, 1, -1))
    shape = list(grouped.shape)
    shape[channel_axis - 1] = gamma
    spread: Tensor = grouped.expand(shape).flatten(channel_axis - 2, channel_axis)
    return spread.contiguous()


@overridable
def full_size(x: Tensor, axis: int | None = None, *, gamma: int, channel_axis: int) -> Any:
    """Return the size that a compact tensor has when spread, of all axes or of one."""
    sizes = list(x.shape)
    sizes[channel_axis] *= gamma
    return torch.Size(sizes) if axis is None else sizes[axis]


@overridable
def require_axes(x: Tensor, count: int) -> Tensor:
    """Return ``x``, for whose number of axes the graph was folded.

    Raises:
        InputError: it has another number of axes.
    """
    if x.dim() != count:
        raise InputError(
            f"expected a tensor with {count} axes (a batch), for which the channels of this graph were "
            f"folded, found shape {tuple(x.shape)}; add a batch axis, or transform without 'fold-splits' "
            "(weight_splitting_fold=False)"
        )
    return x


@overridable
def fold_weight(
    weight: Tensor,
    *,
    rows: int = 1,
    columns: int = 1,
    inner: int = 1,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """Sum a layer's weight over the synapses of its connections, on the side of its outputs and its inputs.

    With the summed weight the layer computes, from compact inputs, the sums over ``rows`` neighbouring
    outputs. Its gradient goes to each of the synapses alike.

    Args:
        weight: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` when transposed.
        rows: synapses per connection among the outputs, a count; 1 leaves that side as it is.
        columns: likewise among the inputs.
        inner: neighbouring inputs that belong to one channel, a count; more than 1 behind a flatten.
        groups: groups of the unfolded convolution; :func:`folded_shape` gives those of the folded one.
        transposed: whether it is a transposed convolution's.

    >>> fold_weight(torch.arange(8.0).reshape(2, 4), rows=2, columns=2).tolist()
    [[10.0, 18.0]]
    """
    dense = type(weight) in (Tensor, nn.Parameter) and weight.is_contiguous()
    if groups == 1 and not transposed and dense and is_plain_eager():
        if not torch.is_grad_enabled():
            forget_memory(weight)
        folded: Tensor = _FoldDense.apply(weight, rows, columns, inner)  # type: ignore[no-untyped-call]
        return folded
    if inner > 1:
        weight = weight.unflatten(1, (-1, columns, inner)).sum(2).flatten(1)
        columns = 1
    sides = [(columns, not transposed), (rows, transposed)]
    for gamma, within_group in sides:
        if gamma > 1:
            fold = _fold_within_groups if within_group else _fold_across_groups
            weight, groups = fold(weight, gamma, groups)
    return weight


def _fold_across_groups(weight: Tensor, gamma: int, groups: int) -> tuple[Tensor, int]:
    """Sum along the axis that counts the channels of all groups one after the other."""
    each = weight.shape[0] // groups
    if each % gamma == 0:
        return weight.unflatten(0, (-1, gamma)).sum(1), groups
    merged = gamma // each  # this many groups make up one connection
    return weight.unflatten(0, (-1, merged, each)).sum(2).flatten(1, 2), groups // merged


def _fold_within_groups(weight: Tensor, gamma: int, groups: int) -> tuple[Tensor, int]:
    """Sum along the axis that counts the channels of one group."""
    each = weight.shape[1]
    if each % gamma == 0:
        return weight.unflatten(1, (-1, gamma)).sum(2), groups
    return weight.sum(1, keepdim=True), groups // (gamma // each)


def _sum_members(weight: Tensor, rows: int, columns: int, inner: int) -> Tensor:
    shape = [weight.shape[0] // rows, weight.shape[1] // columns, *weight.shape[2:]]
    kernel = math.prod(weight.shape[2:])
    summed = weight.reshape(weight.shape[0], weight.shape[1] // inner, inner * kernel)
    for axis, gamma in ((0, rows), (1, columns)):
        if gamma > 1:
            members = summed.unflatten(axis, (-1, gamma)).unbind(axis + 1)
            summed = members[0] + members[1]
            for member in members[2:]:
                summed += member
    return summed.reshape(shape)


class _FoldDense(torch.autograd.Function):
    """The eager fold of a weight without groups: adds strided slices, faster than sums of short axes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: int, columns: int, inner: int) -> Tensor:
        ctx.shape, ctx.rows, ctx.columns, ctx.inner = weight.shape, rows, columns, inner
        ctx.weight = weight if weight.is_leaf and is_large(weight) else None
        return _sum_members(weight, rows, columns, inner)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rows, columns = ctx.shape[0] // ctx.rows, ctx.shape[1] // ctx.inner // ctx.columns
        spread = gradient.reshape(rows, columns, -1)
        if ctx.columns > 1:
            members = spread.new_empty(rows, columns, ctx.columns, spread.shape[-1])
            for member in range(ctx.columns):  # an expanded axis this short would be copied far more slowly
                members[:, :, member] = spread
            spread = members
        spread = spread.reshape(rows, 1, -1).expand(rows, ctx.rows, -1)
        weight: Tensor | None = ctx.weight
        if weight is None or torch.is_grad_enabled() or weight.dtype != gradient.dtype:
            return spread.reshape(ctx.shape), None, None, None
        memory = last_memory(weight)
        full = torch.empty_like(weight, requires_grad=False) if memory is None else memory
        full.view_as(spread).copy_(spread)
        remember_memory(weight, full.untyped_storage())
        return full, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _sum_members(tangent, ctx.rows, ctx.columns, ctx.inner)


@overridable
def sum_sub_weights(weight: Tensor, *others: Tensor) -> Tensor:
    """Return the sum of a layer's sub-weights; each receives the gradient of the sum.

    Args:
        weight: the first sub-weight, any shape.
        *others: at least one, shaped like it.

    >>> sum_sub_weights(torch.ones(2), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).tolist()
    [5.0, 7.0]
    """
    return added_up(weight, others)


@overridable
def level_gradient(weight: Tensor, *, rate: float) -> Tensor:
    """Return ``weight`` unchanged; its gradient is multiplied by one number on the way back.

    Synapses that are added up take one step each, so their sum takes as many. With ``rate`` 1 over their
    number it takes the step of the one weight that they stand for.

    Args:
        weight: any shape.
        rate: dimensionless.
    """
    if is_recorded():
        held = held_back(weight)
        return held + (weight - held) * rate
    levelled: Tensor = _LevelGradient.apply(weight, rate)  # type: ignore[no-untyped-call]
    return levelled


class _LevelGradient(torch.autograd.Function):
    """The eager form of :func:`level_gradient`: a view forwards, one product backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, rate: float) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.rate = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        free = is_exclusive(gradient)  # asked before anything else here refers to it
        return gradient.mul_(ctx.rate) if free else gradient * ctx.rate, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        scaled: Tensor = tangent * ctx.rate
        return scaled


def folded_shape(
    shape: tuple[int, ...], *, rows: int, columns: int, groups: int, transposed: bool
) -> tuple[tuple[int, ...], int] | None:
    """Return a folded weight's shape and its convolution's groups, None where it cannot be folded."""
    first, second, *kernel = shape
    for gamma, within_group in ((columns, not transposed), (rows, transposed)):
        each = second if within_group else first // groups
        if gamma == 1:
            continue
        if each % gamma == 0:
            first, second = (first, second // gamma) if within_group else (first // gamma, second)
        elif gamma % each == 0 and groups % (gamma // each) == 0:
            merged = gamma // each
            first, second = (first, 1) if within_group else (first // gamma, merged * second)
            groups //= merged
        else:
            return None
    return (first, second, *kernel), groups
