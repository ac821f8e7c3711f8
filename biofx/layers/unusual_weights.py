"""Weights whose values nothing here computes with: none at all, sparse, quantised or whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

_ORDINARY_SUBCLASSES = ("torch.distributed", "torch._subclasses")


def obstacle_to_values(weight: Tensor) -> str | None:
    """Return why a weight is left as it is, None if it is an array of numbers that can be trained."""
    kind = type(weight)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not kind.__module__.startswith(
        _ORDINARY_SUBCLASSES
    ):
        return f"its weight is a {kind.__name__}, which only the library that it comes from computes with"
    if weight.layout is not torch.strided:
        return f"its weight is sparse ({weight.layout})"
    if weight.numel() == 0:
        return f"it has no weights: their shape is {tuple(weight.shape)}"
    is_tiny = weight.is_floating_point() and weight.element_size() == 1
    if is_tiny or not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight is of type {weight.dtype}, in which nothing is trained"
    return None


def obstacle_to_signs(weight: Tensor) -> str | None:
    """Return why a weight can have no sign, None if it can."""
    return "its weight is complex, and only real numbers have a sign" if weight.is_complex() else None
