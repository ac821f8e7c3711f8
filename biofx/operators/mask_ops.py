"""What graphs call for fixed sparse connectivity: a weight without the connections that do not exist."""

from __future__ import annotations

import torch
from torch import Tensor

from biofx.operators.arriving import announced, arrival_at, is_shared, remember_parameter
from biofx.operators.dispatch import is_spread, outside_graphs, overridable, refuse_shard
from biofx.operators.parts import is_laid_out_like, local, local_part, on_parts

EXISTS, MISSING, FORBIDDEN = 1.0, 0.0, -1.0
"""What a mask holds for a connection that exists, for one that may grow, and for one that never can."""
MASK_INITIALISATIONS = ("rescale", "keep")
"""What becomes of weights when some connections are first masked."""
GROWTHS = ("random", "gradient")
"""Which of the missing connections grow when others vanish."""
_LEAST = 0.5
"""A connection exists above it; averages of masks lie between the values."""


@overridable
def mask_weight(weight: Tensor, mask: Tensor, *, probe: Tensor | None = None) -> Tensor:
    """Return ``weight`` with exactly 0 where no connection exists, whatever the weight holds there.

    Its gradient is exactly 0 there, too, so that nothing an optimizer remembers can move such an entry.

    Args:
        weight: real, any shape.
        mask: shaped like it; more than 0.5 where a connection exists (:data:`EXISTS`), else
            :data:`MISSING` or :data:`FORBIDDEN`. It receives no gradient.
        probe: zeros shaped like the weight, which receive the gradient of all connections, missing ones
            too, if they require one; else they are not looked at.
    """
    if is_spread(mask) and not (is_spread(weight) and is_laid_out_like(mask, weight)):
        return outside_graphs(_masked_on_arrival)(weight, mask, probe)
    if torch.compiler.is_compiling():
        return _masked(weight, mask, probe)
    if is_spread(weight):
        refuse_shard(weight)
        others = (mask,) if probe is None else (mask, probe)
        return remember_parameter(on_parts(_masked, weight, *others), weight)
    masked = _masked(weight, mask, probe)
    return remember_parameter(masked, weight) if is_shared() else masked


def _masked_on_arrival(weight: Tensor, mask: Tensor, probe: Tensor | None) -> Tensor:
    """Return a weight whose missing connections are 0 already; its gradient is masked once it has arrived."""
    arrival = arrival_at(mask)

    def act(part: Tensor) -> None:
        if probe is not None and probe.requires_grad:
            seen = torch.zeros_like(probe, requires_grad=False)
            local_part(seen, arrival.weight).copy_(part)
            probe.grad = seen if probe.grad is None else probe.grad + seen
        part.copy_(_masked(part, local(mask)))

    return remember_parameter(announced(weight, arrival, "mask", act), weight)


def _masked(weight: Tensor, mask: Tensor, probe: Tensor | None = None) -> Tensor:
    # a tenth of the time of torch.where, and nothing of NaN or infinity is left as by a product
    masked: Tensor = torch.ops.aten.threshold_backward(weight, mask.to(weight.dtype), _LEAST)
    return masked + probe if probe is not None and probe.requires_grad else masked


def existing(mask: Tensor) -> Tensor:
    """Return where connections exist, bool, shaped like the mask."""
    return mask > _LEAST
