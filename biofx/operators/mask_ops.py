"""What graphs call for fixed sparse connectivity: a weight without the connections that do not exist."""

from __future__ import annotations

import torch
from torch import Tensor

from biofx.operators.dispatch import overridable, refuse_shard

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
    if not torch.compiler.is_compiling():
        refuse_shard(weight)
    # a tenth of the time of torch.where, and nothing of NaN or infinity is left as by a product
    masked: Tensor = torch.ops.aten.threshold_backward(weight, mask.to(weight.dtype), _LEAST)
    return masked + probe if probe is not None and probe.requires_grad else masked


def existing(mask: Tensor) -> Tensor:
    """Return where connections exist, bool, shaped like the mask."""
    return mask > _LEAST
