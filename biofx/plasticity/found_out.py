"""What a tensor's values say, asked of its device once and not at every step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

Found = TypeVar("Found")


class FoundOut(Generic[Found]):
    """What was found out about a tensor, valid until that is written to; neither copied nor saved.

    What is written through ``.data`` is not noticed, as autograd does not notice it either.
    """

    def __init__(self) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: None
        self._version = -1
        self._found: Found | None = None

    def of(self, tensor: Tensor, find_out: Callable[[Tensor], Found]) -> Found:
        """Return what was found out about a tensor, or find it out.

        Args:
            tensor: any; of an inference tensor, which does not count what is written to it, nothing is kept.
            find_out: reads it.
        """
        if tensor.is_inference():
            return find_out(tensor)
        if self._tensor() is not tensor or self._version != tensor._version or self._found is None:
            self._tensor, self._version = weakref.ref(tensor), tensor._version
            self._found = find_out(tensor)
        return self._found

    def __reduce__(self) -> Any:
        return FoundOut, ()
