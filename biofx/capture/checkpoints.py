"""Noticing ``torch.utils.checkpoint`` while a forward is captured, by whatever name it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

_FUNCTION: Any = inspect.unwrap(checkpoint)
_CODE = _FUNCTION.__code__
OPTIONS = frozenset({"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"})
"""What a graph can say about checkpointing."""
_CALL = "__call__"
Handler = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
_handlers: list[Handler] = []


def _instead(function: Any, *args: Any, **kwargs: Any) -> Any:
    from biofx.capture.checkpoints import reached

    return reached(function, args, kwargs)


def reached(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let the handler decide on a call of ``checkpoint``; it is handed the original."""
    original = FunctionType(_CODE, _FUNCTION.__globals__, _FUNCTION.__name__, _FUNCTION.__defaults__)
    original.__kwdefaults__ = _FUNCTION.__kwdefaults__
    return _handlers[-1](original, function, args, kwargs)


@contextmanager
def checkpoints_handled(handler: Handler) -> Iterator[None]:
    """Hand every call of ``checkpoint`` to a handler meanwhile.

    Models import the function under names of their own, so it is its code that is replaced.
    """
    _handlers.append(handler)
    _FUNCTION.__code__ = _instead.__code__
    try:
        yield
    finally:
        _handlers.pop()
        if not _handlers:
            _FUNCTION.__code__ = _CODE


def checkpointed_module(function: Any) -> nn.Module | None:
    """Return the module whose call, and no more, is checkpointed; None if something else is."""
    plain_call: Any = getattr(nn.Module, _CALL)
    module = function
    if isinstance(function, MethodType) and function.__func__ is plain_call:
        module = function.__self__
    calls_plainly = getattr(type(module), _CALL, None) is plain_call
    return module if isinstance(module, nn.Module) and calls_plainly else None
