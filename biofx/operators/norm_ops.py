"""Normalisation as functions of visible weights, where torch has none that does all its module does."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from biofx.errors import InputError


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
    given = (x, weight, bias, running_mean, running_var, num_batches_tracked, training)
    options: dict[str, Any] = {
        "momentum": momentum,
        "eps": eps,
        "ranks": ranks,
        "track_running_stats": track_running_stats,
    }
    if has_torch_function(given):
        return _tensor(handle_torch_function(batch_norm, given, *given, **options))
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
    given = (x, weight, bias, running_mean, running_var, training)
    options: dict[str, Any] = {
        "momentum": momentum,
        "eps": eps,
        "rank": rank,
        "track_running_stats": track_running_stats,
    }
    if has_torch_function(given):
        return _tensor(handle_torch_function(instance_norm, given, *given, **options))
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


def _tensor(value: Any) -> Tensor:
    result: Tensor = value
    return result
