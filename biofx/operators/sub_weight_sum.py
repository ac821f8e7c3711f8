"""How sub-weights are added up where operators run as they are called, without fresh memory at each step.

A layer needs the sum, and each of the sub-weights a gradient of its own. Asking the system for that memory
takes several times as long as filling it. So the second gradient is written where the sum was, once the layer
has let go of it, and the next sum where that gradient was, once the optimizer has let go of it. Whether
something else still holds memory shows in its reference count.

What it saves (3072-3000-3000-100 at batch 100, two sub-weights, CPU time of a training step over that of the
plain model): 1.62 becomes 1.36 with the first, 1.13 with both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biofx.operators.dispatch import is_plain_eager
from biofx.operators.gradient_memory import (
    is_free_for,
    is_large,
    laid_out,
    last_memory,
    remember_memory,
)


def added_up(weight: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    """Return the sum of weights, each of which receives the gradient of the sum."""
    weights = (weight, *others)
    if is_plain_eager() and torch.is_grad_enabled() and all(map(is_large, weights)):
        summed: Tensor = _Sum.apply(*weights)  # type: ignore[no-untyped-call]
        return summed
    total = weight + others[0]
    for other in others[1:]:
        total += other
    return total


class _Sum(torch.autograd.Function):
    """The sum, in memory of an earlier gradient if that is free; backwards, a gradient for each."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        first, second, *others = weights
        alike = all(weight.dtype == first.dtype for weight in weights)
        total = torch.add(first, second, out=last_memory(second) if alike else None)
        for other in others:
            total += other
        ctx.space, ctx.count = total.untyped_storage(), len(weights)
        ctx.second = second if second.is_leaf else None
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        space, ctx.space = ctx.space, None
        further: int = ctx.count - 2
        if torch.is_grad_enabled():
            return gradient, gradient, *(gradient,) * further
        if space is not None and gradient.is_contiguous() and is_free_for(space, gradient):
            second = laid_out(space, gradient).copy_(gradient)
            if ctx.second is not None:
                remember_memory(ctx.second, space)
        else:
            second = gradient.clone()
        return gradient, second, *(gradient.clone() for _ in range(further))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        total = tangents[0] + tangents[1]
        for tangent in tangents[2:]:
            total = total + tangent
        return total
