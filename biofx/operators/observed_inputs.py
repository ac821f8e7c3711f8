"""What graphs call to watch the units that a weight reads, for the turnover of units."""

from __future__ import annotations

import torch
from torch import Tensor

from biofx.operators.dispatch import overridable
from biofx.operators.rate_ops import is_recomputed

FORWARDS, MAGNITUDE, MEAN, RUNNING_MEAN = range(4)
"""Rows of what is kept for each input channel: forwards since the last turnover, a count; the means of |x|
and of x over them; and the running mean of x over turnovers, which the operator leaves alone."""
WATCHED = 4
"""How many rows there are."""


@overridable
def observe_inputs(
    x: Tensor, seen: Tensor, training: bool, *, channel_axis: int, nonnegative: bool = False
) -> Tensor:
    """Return ``x``; in training, let ``seen`` follow the means of ``|x|`` and ``x`` of each channel.

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
    if training and not torch._C._are_functorch_transforms_active() and not is_recomputed():
        with torch.no_grad():
            axes = [axis for axis in range(-x.dim(), 0) if axis != channel_axis]
            values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            mean = (values.mean(axes) if axes else values).to(seen.dtype)
            magnitude = mean
            if not nonnegative:
                magnitude = (values.abs().mean(axes) if axes else values.abs()).to(seen.dtype)
            taken = (mean.isfinite() & magnitude.isfinite()).to(seen.dtype)
            forwards = seen[FORWARDS] + taken
            share = taken / forwards.clamp(min=1)
            for row, value in ((MAGNITUDE, magnitude), (MEAN, mean)):
                follows = torch.lerp(seen[row], value, share)
                seen[row].copy_(torch.where(taken > 0, follows, seen[row]))
            seen[FORWARDS].copy_(forwards)
    return x
