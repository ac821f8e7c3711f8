"""What graphs call to watch the units that a weight reads, for the turnover of units."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from biofx.operators.dispatch import overridable
from biofx.operators.rate_ops import is_recomputed
from biofx.torch_private import functorch_is_active

FORWARDS, MAGNITUDE, MEAN, RUNNING_MEAN = range(4)
"""Rows of what is kept for each input channel: forwards since the last turnover, a count; over them the sums
of the means of |x| and of x; and the running mean of x over turnovers, which the operator leaves alone."""
WATCHED = 4
"""How many rows there are."""


@overridable
def observe_inputs(
    x: Tensor, seen: Tensor, training: bool, *, channel_axis: int, nonnegative: bool = False
) -> Tensor:
    """Return ``x``; in training, add the means of ``|x|`` and ``x`` of each channel to ``seen``.

    Each forward counts alike. Means that are not finite are not taken. As for
    :func:`~biofx.operators.rate_ops.observe_activity`, nothing is observed under ``torch.func`` transforms,
    nor when checkpointing computes a forward for the second time.

    Args:
        x: what a weight reads, any rank.
        seen: ``(4, channels)``, changed in place; the rows are :data:`FORWARDS`, :data:`MAGNITUDE`,
            :data:`MEAN` and :data:`RUNNING_MEAN`.
        training: whether the layer is in training mode.
        channel_axis: counted from the end.
        nonnegative: whether no entry of ``x`` can be negative, so that both means are one.
    """
    if training and not functorch_is_active() and not is_recomputed():
        rank = x.dim()
        held = x.detach() if rank > 1 else x.detach().unsqueeze(0)
        axes = [axis for axis in range(-max(rank, 2), 0) if axis != channel_axis]
        sums = held.sum(axes, dtype=seen.dtype)
        if not nonnegative:
            magnitude = held.abs().sum(axes, dtype=seen.dtype)
            sums = torch.stack((magnitude, magnitude, sums, magnitude))
        counts, divisors = _one_forward(x.numel() // seen.shape[1], seen)
        means = torch.addcdiv(counts, sums, divisors)  # not a number where a sum is not finite
        seen.add_(means.nan_to_num_(0.0, 0.0, 0.0))
    return x


@overridable
def observe_state(result: Any, seen: Tensor, training: bool, *, direction: int = 0) -> Any:
    """Return what a recurrent layer returned; in training, add its units' means to ``seen``.

    The hidden state of all steps is what the layer's weights read one step later.

    Args:
        result: the sequence of hidden states, units on the last axis, or a ``PackedSequence`` of it; and the
            state at the end.
        seen: ``(4, units)``, as :func:`observe_inputs` takes it.
        training: whether the layer is in training mode.
        direction: which of the layer's directions, each with as many units.
    """
    output = result[0]
    states = output.data if isinstance(output, PackedSequence) else output
    units = seen.shape[1]
    own = states[..., direction * units : (direction + 1) * units]
    observe_inputs(own, seen, training, channel_axis=-1)
    return result


def _one_forward(entries: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a forward adds to each row, but for sums, and what sums are divided by, each ``(4, 1)``.

    Args:
        entries: of each channel, a count; without any, the sums of 0 become not a number.
        seen: gives type and device.
    """
    if type(seen) is Tensor and seen.device.type == "cpu" and not torch.compiler.is_compiling():
        return _kept_one_forward(entries, seen.dtype)
    return _made_one_forward(entries, seen)


def _made_one_forward(entries: int, like: Tensor) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(WATCHED, 1, dtype=like.dtype, device=like.device)
    counts[FORWARDS].fill_(1)
    divisors = torch.full_like(counts, entries)
    divisors[FORWARDS].mul_(math.inf)
    divisors[RUNNING_MEAN].mul_(math.inf)
    return counts, divisors


@functools.lru_cache(maxsize=256)
def _kept_one_forward(entries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _made_one_forward(entries, torch.empty(0, dtype=dtype, device="cpu"))
