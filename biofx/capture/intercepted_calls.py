"""Functions whose calls a capture intercepts, by whatever name a model has imported them.

These are ``torch.utils.checkpoint.checkpoint``, ``apply`` of autograd functions, and functions that cache
what they return (``functools.lru_cache``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from biofx.capture.bytecode import globals_mentioned
from biofx.capture.symbolic_scalars import is_symbolic
from biofx.static_inspection import bases_outside_torch, is_of, package_of

Handler = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
OPTIONS = frozenset({"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"})
"""Options of ``checkpoint`` that a graph can hold."""
_FUNCTION: Any = inspect.unwrap(checkpoint)
_CODE = _FUNCTION.__code__
_CALL = "__call__"
_handlers: list[Handler] = []


def _instead(function: Any, *args: Any, **kwargs: Any) -> Any:
    from biofx.capture.intercepted_calls import handle_checkpoint

    return handle_checkpoint(function, args, kwargs)


def handle_checkpoint(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pass a call of ``checkpoint``, and the original function, to the handler."""
    original = FunctionType(_CODE, _FUNCTION.__globals__, _FUNCTION.__name__, _FUNCTION.__defaults__)
    original.__kwdefaults__ = _FUNCTION.__kwdefaults__
    return _handlers[-1](original, function, args, kwargs)


@contextmanager
def checkpoints_handled(handler: Handler) -> Iterator[None]:
    """Let ``handler(original, function, args, kwargs)`` do every call of ``checkpoint``.

    Models import the function under names of their own, so its code is replaced.
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


@contextmanager
def applications_handled(handler: Callable[..., Any]) -> Iterator[None]:
    """Let ``handler(original, function, args, kwargs)`` apply every autograd function.

    A model may have kept ``apply`` under a name of its own, as in ``relu = MyRelu.apply``. That is the method
    of ``torch.autograd.Function``, so the one that it calls is replaced.
    """
    base: Any = torch.autograd.function._SingleLevelFunction

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return handler(super(base, cls).apply, cls, args, kwargs)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply


def can_be_applied(function: type[torch.autograd.Function]) -> bool:
    """Whether an autograd function has the ``apply`` of ``torch.autograd.Function``, not one of its own."""
    return next(kind for kind in function.__mro__ if "apply" in vars(kind)) is torch.autograd.Function


_Cached: Any = functools._lru_cache_wrapper


@contextmanager
def caches_bypassed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the forwards of some modules find cached functions that do not cache what belongs to the capture.

    A cached proxy or tensor of the capture would be returned after it, in the original model. With arguments
    that are known, a function is called as usual and returns what every call of the model gets; with others
    it is computed again.
    """
    replaced: list[tuple[Any, str, Any]] = []
    for kind in {type(module) for module in modules}:
        if package_of(kind) == "torch":
            continue
        for space, name in globals_mentioned(kind, of_libraries=True):
            if type(space.get(name)) is _Cached:
                replaced.append((space, name, space[name]))
                space[name] = _WithoutCache(space[name])
        for base in bases_outside_torch(kind):
            for name, held in list(vars(base).items()):
                if type(held) is _Cached:
                    replaced.append((base, name, held))
                    setattr(base, name, _WithoutCache(held))
    try:
        yield
    finally:
        for place, name, held in replaced:
            if is_of(place, type):
                setattr(place, name, held)
            else:
                place[name] = held


class _WithoutCache:
    """Replaces a cached function; itself not a function, as ``lru_cache`` returns none."""

    def __init__(self, cached: Any) -> None:
        self._cached = cached
        functools.update_wrapper(self, cached)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(_is_of_the_capture(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            return self._cached.__wrapped__(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self._cached(*args, **kwargs)

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else functools.partial(self, owner)


def _is_of_the_capture(value: Any) -> bool:
    sizes = value if is_of(value, torch.Size) else (value,)  # not every version of pytree looks into these
    return is_of(value, (Tensor, torch.fx.Proxy, nn.Module)) or any(map(is_symbolic, sizes))
