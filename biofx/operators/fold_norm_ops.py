"""Normalisation in folded graphs: statistics of compact tensors, affine maps that set members apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function

from biofx.errors import InputError
from biofx.operators.fold_ops import spread_synapses
from biofx.operators.norm_ops import follow_batches
from biofx.operators.synapse_ops import is_plain_eager, redispatch


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
    tensors = (x, running_mean, running_var, count, weight, bias, training)
    options: dict[str, Any] = {
        "gamma": gamma,
        "channel_axis": channel_axis,
        "momentum": momentum,
        "eps": eps,
        "ranks": ranks,
        "track_running_stats": track_running_stats,
    }
    if has_torch_function(tensors):
        return redispatch(batch_norm_synapses, tensors, *tensors, **options)
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
        running_mean.unflatten(0, (-1, gamma)).lerp_(mean.unsqueeze(1), share)
        running_var.unflatten(0, (-1, gamma)).lerp_(variance.unsqueeze(1), share)
        scale, shift = weight, bias
    else:
        normalised = x
        scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - running_mean * scale
    groups = x.shape[channel_axis]
    return affine_synapses(normalised, scale, shift, gamma=gamma, channel_axis=channel_axis, groups=groups)
