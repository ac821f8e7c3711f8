"""Copies of modules that hold the results of computations, which ``copy.deepcopy`` alone refuses."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn


def without_history(module: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Let a copy of a module hold the values of computed tensors, and not what they were computed from.

    Hooks such as those of ``torch.nn.utils.weight_norm`` leave a computed weight in the layer and compute it
    anew at every call.

    Args:
        module: what is to be copied.
        memo: of ``copy.deepcopy``; what such tensors become goes into it.

    Returns:
        ``memo``.
    """
    for inner in module.modules():
        for value in itertools.chain(vars(inner).values(), inner._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo.setdefault(id(value), value.detach().clone())
    return memo
