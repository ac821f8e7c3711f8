"""Calls of a ``torch.autograd.Function`` as nodes: what it does, both ways, is its own business."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Proxy
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class AppliedFunction:
    """Applies an autograd function; tracing a graph again finds the one call, and does not look inside.

    It is pickled as the name of the function's class, which must be importable where it is loaded.
    """

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply it."""
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Proxy):
                return leaf.tracer.create_proxy("call_function", self, args, kwargs)
        apply: Any = self.function.apply
        return apply(*args, **kwargs)


def can_be_applied(function: type[torch.autograd.Function]) -> bool:
    """Whether applying a function means what it means for every other: it has no ``apply`` of its own."""
    return next(kind for kind in function.__mro__ if "apply" in vars(kind)) is torch.autograd.Function


@contextmanager
def applications_handled(handle: Callable[..., Any]) -> Iterator[None]:
    """Let ``handle(original, function, args, kwargs)`` decide what applying an autograd function does.

    That is so under whatever name ``apply`` was kept, as in ``relu = MyRelu.apply``: such a name leads to the
    function of torch's own, and only what that calls can be another.
    """
    between: Any = torch.autograd.function._SingleLevelFunction

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return handle(super(between, cls).apply, cls, args, kwargs)

    between.apply = classmethod(apply)
    try:
        yield
    finally:
        del between.apply
