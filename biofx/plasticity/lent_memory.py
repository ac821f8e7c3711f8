"""Memory as large as the weights that an optimizer's step needs, kept from one step to the next.

The system hands out fresh memory more slowly than it can be filled: of a step of a fully connected network
that is a tenth and more.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable

import torch
from torch import Tensor

from biofx.operators.parts import is_sharded
from biofx.torch_private import storage_use_count


class LentMemory:
    """Tensors that are lent for one step; what somebody still holds after it is left to them."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Tensor] = {}
        self._lent: set[Hashable] = set()
        self._held[None] = torch.empty(0)
        self._alone = self._holders(None)

    def copy_of(self, key: Hashable, tensor: Tensor) -> Tensor:
        """Return a copy, which is valid until the end of the step.

        Args:
            key: whose it is; equal keys get the same memory at each step.
            tensor: in any layout, which the copy has too; of a sharded or sparse one the copy is a fresh one.
        """
        if tensor.layout is not torch.strided:
            return tensor.detach().clone()
        return self.like(key, tensor).copy_(tensor.detach())

    def like(self, key: Hashable, tensor: Tensor) -> Tensor:
        """Return memory for a copy, with anything in it.

        Args:
            key: as in :meth:`copy_of`.
            tensor: dense.
        """
        if is_sharded(tensor):
            return torch.empty_like(tensor, requires_grad=False)
        held = self._held.get(key)
        if held is None or key in self._lent or not _is_alike(held, tensor):
            held = self._held[key] = torch.empty_like(tensor, requires_grad=False)
        self._lent.add(key)
        return held

    def settle(self) -> None:
        """Take back what was lent, at the end of a step."""
        for key in self._lent:
            if self._alone is None or self._holders(key) != self._alone:
                del self._held[key]
        self._lent.clear()

    def _holders(self, key: Hashable) -> tuple[int, int] | None:
        """Return how many hold a tensor, and how many its memory; None where torch does not say."""
        try:
            storage = self._held[key].untyped_storage()
            return sys.getrefcount(self._held[key]), storage_use_count(storage)
        except (AttributeError, RuntimeError):
            return None


def _is_alike(held: Tensor, other: Tensor) -> bool:
    same = (held.shape, held.dtype, held.device) == (other.shape, other.dtype, other.device)
    return same and held.stride() == other.stride()
