"""The memory of a weight's last gradient, used again where operators run as they are called.

Asking the system for memory as large as a weight takes several times as long as filling it. So an operator
that works on a parameter remembers where the parameter's gradient was, and writes there again once the
optimizer has let go of it. Whether something else still holds memory shows in its reference count.

What it saves (3072-3000-3000-100 at batch 100, one thread, CPU time of a training step over that of the plain
model): a split in 2 falls from 0.67 to 0.50, rates and signs from 1.36 to 1.17. What it costs: between steps
the memory is not given back, until a forward without gradients comes or the weight is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from biofx.torch_private import storage_use_count

_WORTH_IT = 1 << 20
"""Bytes of a weight from which on the system is asked for its memory; below, it is kept by the process."""
_SPACES: Any = WeakTensorKeyDictionary()
"""The memory of a parameter's last gradient."""


def is_large(weight: Tensor) -> bool:
    """Whether a weight is trained, and a dense tensor on the CPU that is large enough."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.requires_grad
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.nbytes >= _WORTH_IT
    )


def remember_memory(weight: Tensor, space: Any) -> None:
    """Remember the memory that a parameter's gradient is in.

    Args:
        weight: a leaf, as :func:`is_large` has it.
        space: an untyped storage.
    """
    _SPACES[weight] = space


def last_memory(weight: Tensor) -> Tensor | None:
    """Return a tensor laid out like a weight, in the memory of its last gradient, which is then forgotten.

    Its values are arbitrary. None if there is no such memory, or if something else holds it.

    Args:
        weight: contiguous.
    """
    space = _SPACES.pop(weight, None)
    return laid_out(space, weight) if space is not None and is_free_for(space, weight) else None


def forget_memory(weight: Tensor) -> None:
    """Give the memory of a weight's last gradient back, as far as nothing else holds it."""
    _SPACES.pop(weight, None)


def is_free_for(space: Any, like: Tensor) -> bool:
    """Whether a tensor fits in memory that nothing but the caller's one reference holds.

    Memory that processes share counts as held.
    """
    fits: bool = space.nbytes() == like.nbytes and storage_use_count(space) == 1
    return fits and not space.is_shared()


def laid_out(space: Any, like: Tensor) -> Tensor:
    """Return a tensor in given memory, shaped like another."""
    return torch.empty(0, dtype=like.dtype).set_(space, 0, like.shape, like.stride())
