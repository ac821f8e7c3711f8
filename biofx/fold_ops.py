"""What folded graphs call: sums over the synapses of a connection, and the way back where one is needed.

A *compact* tensor holds one channel per connection; the *full* one gives each of the ``gamma`` neighbouring
members the same value. See :mod:`biofx.ops` for what the functions of rewritten graphs owe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function

from biofx.errors import InputError, OptionError
from biofx.ops import redispatch


def sum_synapses(x: Tensor, *, gamma: int, channel_axis: int) -> Tensor:
    """Sum groups of ``gamma`` neighbouring channels: what :func:`biofx.ops.pool_synapses` gives each member.

    Args:
        x: its size along ``channel_axis`` is a multiple of ``gamma``.
        gamma: synapses per connection, a count.
        channel_axis: counted from the end.

    >>> sum_synapses(torch.tensor([1.0, 2.0, 10.0, 20.0]), gamma=2, channel_axis=-1).tolist()
    [3.0, 30.0]
    """
    if has_torch_function((x,)):
        return redispatch(sum_synapses, (x,), x, gamma=gamma, channel_axis=channel_axis)
    if x.shape[channel_axis] % gamma:
        raise OptionError(
            f"sum_synapses expected the size of axis {channel_axis} to be a multiple of gamma={gamma}, "
            f"found shape {tuple(x.shape)}"
        )
    grouped: Tensor = x.unflatten(channel_axis, (-1, gamma))
    return grouped.sum(channel_axis if channel_axis < 0 else channel_axis + 1)


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
    if has_torch_function((x,)):
        return redispatch(spread_synapses, (x,), x, gamma=gamma, channel_axis=channel_axis, groups=groups)
    grouped = x.unflatten(channel_axis, (groups, 1, -1))
    shape = list(grouped.shape)
    shape[channel_axis - 1] = gamma
    return grouped.expand(shape).flatten(channel_axis - 2, channel_axis).contiguous()


def full_size(x: Tensor, axis: int | None = None, *, gamma: int, channel_axis: int) -> Any:
    """Return the size that a compact tensor has when spread, of all axes or of one."""
    if has_torch_function((x,)):
        return redispatch(full_size, (x,), x, axis, gamma=gamma, channel_axis=channel_axis)
    sizes = list(x.shape)
    sizes[channel_axis] *= gamma
    return torch.Size(sizes) if axis is None else sizes[axis]


def require_axes(x: Tensor, count: int) -> Tensor:
    """Return ``x``, for whose number of axes the graph was folded.

    Raises:
        InputError: it has another number of axes.
    """
    if has_torch_function((x,)):
        return redispatch(require_axes, (x,), x, count)
    if x.dim() != count:
        raise InputError(
            f"expected a tensor with {count} axes (a batch), for which the channels of this graph were "
            f"folded, found shape {tuple(x.shape)}; add a batch axis, or transform without 'fold-splits' "
            "(weight_splitting_fold=False)"
        )
    return x


def affine_synapses(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, gamma: int, channel_axis: int, groups: int
) -> Tensor:
    """Spread a compact tensor, each member with a scale and a shift of its own.

    Args:
        x: compact, ``(…, groups * inner, …)`` along ``channel_axis``.
        weight: scales, one for each full channel; or shaped like the last axes of the full tensor, from
            ``channel_axis`` or an earlier one on. None is 1.
        bias: shifts, likewise. None is 0.
        gamma: synapses per connection, a count.
        channel_axis: counted from the end.
        groups: connections, a count.
    """
    if has_torch_function((x, weight, bias)):
        return redispatch(
            affine_synapses,
            (x, weight, bias),
            x,
            weight,
            bias,
            gamma=gamma,
            channel_axis=channel_axis,
            groups=groups,
        )
    y = x.unflatten(channel_axis, (groups, 1, -1))
    if weight is not None:
        y = y * _by_members(weight.to(x.dtype), gamma, channel_axis, groups)
    if bias is not None:
        y = y + _by_members(bias.to(x.dtype), gamma, channel_axis, groups)
    if weight is None and bias is None:
        return spread_synapses(x, gamma=gamma, channel_axis=channel_axis, groups=groups)
    return y.flatten(channel_axis - 2, channel_axis)


def _by_members(entries: Tensor, gamma: int, channel_axis: int, groups: int) -> Tensor:
    """Lay entries of full channels out to broadcast to ``(…, groups, gamma, inner, …)``."""
    if entries.dim() < -channel_axis:
        entries = entries.reshape(-1, *(1,) * (-channel_axis - 1))
    return entries.unflatten(channel_axis, (groups, gamma, -1))


def batch_norm_synapses(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    *,
    gamma: int,
    channel_axis: int,
    momentum: float,
    eps: float,
    ranks: tuple[int, ...],
) -> Tensor:
    """Normalise a compact tensor over its batch and spread it, with an affine map for each member.

    The statistics are those of the compact channels, which are those of their members; what the members
    remember of them is their own, as in ``nn.BatchNorm``.

    Args:
        x: compact, ``(batch, channels / gamma, *)``.
        running_mean: ``(channels,)``, changed in place in training; None to normalise by the batch always.
        running_var: likewise.
        count: batches so far, changed in place; None where it is not kept.
        weight: ``(channels,)`` or None.
        bias: ``(channels,)`` or None.
        training: whether the layer is in training mode.
        gamma: synapses per connection, a count.
        channel_axis: where the compact channels are, counted from the end.
        momentum: weight of the new statistics, dimensionless.
        eps: added to the variance.
        ranks: numbers of axes that the layer takes.

    Raises:
        InputError: ``x`` has another number of axes.
    """
    tensors = (x, running_mean, running_var, count, weight, bias, training)
    options: dict[str, Any] = {
        "gamma": gamma,
        "channel_axis": channel_axis,
        "momentum": momentum,
        "eps": eps,
        "ranks": ranks,
    }
    if has_torch_function(tensors):
        return redispatch(batch_norm_synapses, tensors, *tensors, **options)
    if x.dim() not in ranks:
        raise InputError(f"expected a tensor with {ranks} axes to normalise, found shape {tuple(x.shape)}")
    if training and count is not None:
        count.add_(1)
    by_batch = training or running_mean is None or running_var is None
    if x.dim() + channel_axis != 1:  # the batch has more axes than the channels are counted on
        full = spread_synapses(x, gamma=gamma, channel_axis=channel_axis, groups=x.shape[channel_axis])
        return F.batch_norm(full, running_mean, running_var, weight, bias, by_batch, momentum, eps)
    if running_mean is None or running_var is None:
        normalised, scale, shift = F.batch_norm(x, None, None, training=True, eps=eps), weight, bias
    elif training:
        mean, variance = torch.zeros_like(running_mean[::gamma]), torch.zeros_like(running_var[::gamma])
        normalised = F.batch_norm(x, mean, variance, training=True, momentum=1.0, eps=eps)
        running_mean.unflatten(0, (-1, gamma)).lerp_(mean.unsqueeze(1), momentum)
        running_var.unflatten(0, (-1, gamma)).lerp_(variance.unsqueeze(1), momentum)
        scale, shift = weight, bias
    else:
        normalised = x
        scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - running_mean * scale
    groups = x.shape[channel_axis]
    return affine_synapses(normalised, scale, shift, gamma=gamma, channel_axis=channel_axis, groups=groups)


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
        groups: groups of the convolution as it was; :func:`folded_shape` gives those of the folded one.
        transposed: whether it is a transposed convolution's.

    >>> fold_weight(torch.arange(8.0).reshape(2, 4), rows=2, columns=2).tolist()
    [[10.0, 18.0]]
    """
    if has_torch_function((weight,)):
        return redispatch(
            *(fold_weight, (weight,), weight),
            rows=rows,
            columns=columns,
            inner=inner,
            groups=groups,
            transposed=transposed,
        )
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
