"""The sign projection on plain CPU tensors, without masks and without temporaries as large as a weight.

Masks are slow (a masked fill of a million entries takes 4 ms on one core, a clamp 0.13 ms), and so is fresh
memory. So what is done with a mask elsewhere is done here with clamps and thresholds, block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 17


def project(weight: Tensor, signs: Tensor) -> Tensor:
    """Return ``weight`` with entries of the wrong sign set to zero.

    Args:
        weight: ``(rows, columns)``, contiguous.
        signs: ``(1, columns)`` or ``(rows, 1 or columns)``; +1, -1, or 0 where unconstrained.
    """
    low, high = _bounds(-signs)
    return torch.clamp(weight, low, high)


def project_gradient(gradient: Tensor, weight: Tensor, signs: Tensor, *, in_place: bool) -> Tensor:
    """Return the gradient of projected gradient descent: none that leads out of what is permitted.

    Args:
        gradient: ``(rows, columns)``, contiguous.
        weight: as it was before the projection, likewise.
        signs: as in :func:`project`.
        in_place: whether the gradient itself may be changed.
    """
    result = gradient if in_place else torch.empty_like(gradient)
    low, high = _bounds(signs)
    step = max(1, _BLOCK // weight.shape[1])
    inside = weight.new_empty(min(step, len(weight)), weight.shape[1])
    returning = torch.empty_like(inside)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        block, count = gradient[rows], len(gradient[rows])
        own = [bound[rows] if len(bound) > 1 else bound for bound in (signs, low, high)]
        positive, back = inside[:count], returning[:count]
        torch.mul(weight[rows], own[0], out=positive)  # above 0 where a weight is on its permitted side
        torch.clamp(block, own[1], own[2], out=back)  # what leads a weight back, from wherever it is
        outward = torch.sub(block, back, out=result[rows])
        torch.ops.aten.threshold_backward.grad_input(outward, positive, 0, grad_input=outward)
        outward += back
    return result


def write_signs(weight: Tensor, signs: Tensor, *, flip: bool) -> int:
    """Give entries of the wrong sign the right one, or 0, in place.

    Args:
        weight: any shape, layout and device; not recorded for autograd.
        signs: broadcastable to it, in its dtype; +1, -1, or 0 where unconstrained.
        flip: whether a magnitude stays, with the other sign.

    Returns:
        How many entries were changed, a count.
    """
    signs = signs.reshape((1,) * (weight.dim() - signs.dim()) + signs.shape)
    low, high = _bounds(-signs)
    step = max(1, _BLOCK * len(weight) // max(1, weight.numel()))
    counts = []
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        block = weight[rows]
        own = [part[rows] if len(part) > 1 else part for part in (signs, low, high)]
        wrong = torch.mul(block, own[0]).clamp_(max=0).sign_()  # -1 where it is, else 0
        counts.append(wrong.sum(dtype=torch.float32))
        if flip:
            block.mul_(wrong.mul_(2).add_(1))
        else:
            block.copy_(torch.clamp(block, own[1], own[2]))
    return -int(torch.stack(counts).double().sum()) if counts else 0


def by_rows(signs: Tensor, weight: Tensor) -> Tensor:
    """Lay signs that broadcast to ``weight`` out for its rows, ``(1 or rows, 1 or columns)``."""
    if weight.dim() == 2 or signs.numel() == len(signs):
        return signs.reshape(len(signs), -1)
    return signs.expand(len(signs), *weight.shape[1:]).reshape(len(signs), -1)


def _bounds(signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what values that point against the signs lie between; nothing bounds them where those are 0."""
    zero, infinite = signs.new_zeros(()), signs.new_full((), torch.inf)
    return torch.where(signs < 0, zero, -infinite), torch.where(signs > 0, zero, infinite)
