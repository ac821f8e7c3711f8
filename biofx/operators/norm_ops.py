"""What graphs call for normalisation, where torch has no function that does all that its module does.

In folded graphs statistics are those of compact tensors, and affine maps set the members of a connection
apart (see :mod:`biofx.operators.split_ops`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biofx.errors import InputError
from biofx.operators.dispatch import is_plain_eager, overridable
from biofx.operators.split_ops import spread_synapses


@overridable
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    *,
    momentum: float | None,
    eps: float,
    ranks: tuple[int, ...],
    track_running_stats: bool = True,
) -> Tensor:
    """Return what ``nn.BatchNorm`` returns; in training, count the batch and follow its moments.

    Args:
        x: ``(batch, channels, *)``.
        weight: ``(channels,)``, None for ones.
        bias: ``(channels,)``, None for zeros.
        running_mean: ``(channels,)``, changed in place; without it every batch is normalised by itself.
        running_var: likewise.
        num_batches_tracked: a count, changed in place.
        training: whether the batch's own moments are used, and followed.
        momentum: weight of a new batch in the running moments; None for the mean of all batches so far.
        eps: added to the variance.
        ranks: numbers of axes that an input may have.
        track_running_stats: whether the running moments follow in training.

    Raises:
        InputError: the input has another number of axes.
    """
    _check_rank(x, ranks, "batch_norm")
    share = follow_batches(num_batches_tracked, training and track_running_stats, momentum)
    keeps = not training or track_running_stats
    return F.batch_norm(
        x,
        running_mean if keeps else None,
        running_var if keeps else None,
        weight,
        bias,
        training or (running_mean is None and running_var is None),
        share,
        eps,
    )


def follow_batches(count: Tensor | None, follows: bool, momentum: float | None) -> float:
    """Count a batch whose moments are followed, and return their weight in the running ones.

    Args:
        count: batches so far, changed in place; None where it is not kept.
        follows: whether the running moments follow this batch.
        momentum: weight of a new batch; None for the mean of all batches so far.
    """
    if follows and count is not None:
        count.add_(1)
        if momentum is None:
            return 1.0 / float(count)
    return 0.0 if momentum is None else momentum


@overridable
def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *,
    momentum: float | None,
    eps: float,
    rank: int,
    track_running_stats: bool = False,
) -> Tensor:
    """Return what ``nn.InstanceNorm`` returns; in training the running moments follow, where there are any.

    Args:
        x: ``(batch, channels, *)``, or ``(channels, *)``.
        weight: ``(channels,)``, None for ones.
        bias: ``(channels,)``, None for zeros.
        running_mean: ``(channels,)``, changed in place.
        running_var: likewise.
        training: whether each sample's own moments are used even where there are running ones.
        momentum: weight of a new batch in the running moments.
        eps: added to the variance.
        rank: number of axes of a batch; a sample has one less.
        track_running_stats: whether evaluation uses the running moments.

    Raises:
        InputError: the input has another number of axes.
    """
    _check_rank(x, (rank - 1, rank), "instance_norm")
    alone = x.dim() == rank - 1
    normed = F.instance_norm(
        x.unsqueeze(0) if alone else x,
        running_mean,
        running_var,
        weight,
        bias,
        training or not track_running_stats,
        0.0 if momentum is None else momentum,
        eps,
    )
    return normed.squeeze(0) if alone else normed


def _check_rank(x: Tensor, ranks: tuple[int, ...], name: str) -> None:
    if x.dim() not in ranks:
        raise InputError(
            f"{name}: expected an input of {' or '.join(map(str, ranks))} axes, found shape {tuple(x.shape)}"
        )


@overridable
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
    if weight is None and bias is None:
        return spread_synapses(x, gamma=gamma, channel_axis=channel_axis, groups=groups)
    by_channel = all(entries is None or entries.dim() == 1 for entries in (weight, bias))
    if by_channel and channel_axis < -1 and x.shape[channel_axis] == groups and is_plain_eager():
        return _by_channel(x, weight, bias, gamma, channel_axis)
    y = x.unflatten(channel_axis, (groups, 1, -1))
    if weight is not None:
        y = y * _by_members(weight.to(x.dtype), gamma, channel_axis, groups)
    if bias is not None:
        y = y + _by_members(bias.to(x.dtype), gamma, channel_axis, groups)
    spread: Tensor = y.flatten(channel_axis - 2, channel_axis)
    return spread


def _by_members(entries: Tensor, gamma: int, channel_axis: int, groups: int) -> Tensor:
    """Lay entries of full channels out to broadcast to ``(…, groups, gamma, inner, …)``."""
    if entries.dim() < -channel_axis:
        entries = entries.reshape(-1, *(1,) * (-channel_axis - 1))
    laid_out: Tensor = entries.unflatten(channel_axis, (groups, gamma, -1))
    return laid_out


def _by_channel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, gamma: int, channel_axis: int
) -> Tensor:
    """Do the same in eager mode, with a scale and a shift for each channel and axes behind the channels'."""
    channels = x.shape[channel_axis] * gamma
    scale = x.new_ones(channels) if weight is None else weight.to(x.dtype)
    shift = x.new_zeros(channels) if bias is None else bias.to(x.dtype)
    behind = x.shape[channel_axis + 1 :]
    laid_out = x.reshape(-1, x.shape[channel_axis], behind.numel())
    made: Tensor = _SpreadAffine.apply(laid_out, scale, shift)  # type: ignore[no-untyped-call]
    return made.reshape(*x.shape[:channel_axis], channels, *behind)


class _SpreadAffine(torch.autograd.Function):
    """``y[n, c] = scale[c] * x[n, c // gamma] + shift[c]``, with no temporary as large as the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        samples, groups, size = x.shape
        y = x.new_empty(samples, len(scale), size)  # not a view, so that others may change it in place
        members = y.view(samples, groups, len(scale) // groups, size)
        torch.mul(x.unsqueeze(2), scale.reshape(groups, -1, 1), out=members)
        members += shift.reshape(groups, -1, 1)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        samples, groups, size = x.shape
        each = len(scale) // groups
        members = gradient.reshape(samples * groups, each, size)
        for_shift = members.sum(2).reshape(samples, len(scale)).sum(0)
        for_scale = torch.bmm(members, x.reshape(-1, size, 1)).reshape(samples, len(scale)).sum(0)
        scales = scale.reshape(1, groups, each).expand(samples, -1, -1).reshape(samples * groups, 1, each)
        return torch.bmm(scales, members).reshape(x.shape), for_scale, for_shift


@overridable
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
    momentum: float | None,
    eps: float,
    ranks: tuple[int, ...],
    track_running_stats: bool = True,
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
        momentum: weight of the new statistics, dimensionless; None for the mean of all batches so far.
        eps: added to the variance.
        ranks: numbers of axes that the layer takes.
        track_running_stats: whether the running statistics follow in training.

    Raises:
        InputError: ``x`` has another number of axes.
    """
    if x.dim() not in ranks:
        raise InputError(f"expected a tensor with {ranks} axes to normalise, found shape {tuple(x.shape)}")
    share = follow_batches(count, training and track_running_stats, momentum)
    if training and not track_running_stats:
        running_mean = running_var = None
    by_batch = training or running_mean is None or running_var is None
    if x.dim() + channel_axis != 1:  # the batch has more axes than the channels are counted on
        full = spread_synapses(x, gamma=gamma, channel_axis=channel_axis, groups=x.shape[channel_axis])
        return F.batch_norm(full, running_mean, running_var, weight, bias, by_batch, share, eps)
    if running_mean is None or running_var is None:
        normalised, scale, shift = F.batch_norm(x, None, None, training=True, eps=eps), weight, bias
    elif training:
        mean, variance = torch.zeros_like(running_mean[::gamma]), torch.zeros_like(running_var[::gamma])
        normalised = F.batch_norm(x, mean, variance, training=True, momentum=1.0, eps=eps)
        for running, of_batch in ((running_mean, mean), (running_var, variance)):
            # not seen by autograd, as in F.batch_norm: an earlier call of the layer may need them to go back
            values = running.data if is_plain_eager() else running
            values.unflatten(0, (-1, gamma)).lerp_(of_batch.unsqueeze(1), share)
        scale, shift = weight, bias
    else:
        normalised = x
        scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - running_mean * scale
    groups = x.shape[channel_axis]
    return affine_synapses(normalised, scale, shift, gamma=gamma, channel_axis=channel_axis, groups=groups)
