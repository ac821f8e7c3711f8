"""Functions that a capture replaces, by whatever name a model has imported them.

Builtins and ``math`` read a number or a class out of whatever they are handed; their replacements return what
a proxy is traced for, and numbers that remember their nodes. ``torch.utils.checkpoint`` and ``apply`` of
autograd functions become nodes. Functions that cache what they return (``functools.lru_cache``) must not
cache a proxy.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionMeta
from torch.utils.checkpoint import checkpoint

from biofx.capture.bytecode import globals_mentioned
from biofx.capture.proxies import Value
from biofx.capture.symbolic_scalars import AttributeFloat, SymDtype, computed, is_symbolic
from biofx.static_inspection import attributes_of, bases_outside_torch, is_of, package_of
from biofx.torch_private import (
    APPLY_IS_BUILTIN,
    CLASS_THAT_APPLIES,
    READ_BY_APPLY,
    DisableTorchFunction,
    pytree,
)

Handler = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""Is handed an original function, the object that it was called on or with, and the other arguments."""
_MISSING = object()


@contextmanager
def replaced(places: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Let attributes of modules and classes, or entries of dicts, have other values meanwhile.

    Args:
        places: module, class or dict; name there; and the value to replace what it has.
    """
    before: list[tuple[Any, str, Any]] = []
    try:
        for place, name, value in places:
            before.append((place, name, _held(place, name, _MISSING)))
            _set(place, name, value)
        yield
    finally:
        for entry in reversed(before):
            _set(*entry)


def _held(place: Any, name: str, default: Any = None) -> Any:
    return (place if is_of(place, dict) else vars(place)).get(name, default)


def _set(place: Any, name: str, value: Any) -> None:
    if is_of(place, dict) and value is _MISSING:
        place.pop(name, None)
    elif is_of(place, dict):
        place[name] = value
    elif value is _MISSING:
        delattr(place, name)
    else:
        setattr(place, name, value)


# builtins and math, in the source files of a model


class _TypeMeta(type):
    """Makes a class that is called, and used in ``isinstance``, as ``type`` is."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and issubclass(type(args[0]), Value):
            return args[0].traced_type()
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class _Type(metaclass=_TypeMeta):
    """``type``, which returns for a proxy the class that it is traced for."""


def _symbolic_len(value: Any) -> Any:
    return value.length() if issubclass(type(value), Value) else len(value)


def _eager_len(value: Any) -> Any:
    return value.size(0) if isinstance(value, Tensor) and value.dim() else len(value)


def _eager_range(*bounds: Any) -> range:
    """Return a range; how long it is decides what Python does, so each bound is a decision."""
    return range(*(int(bound) if isinstance(bound, int) else bound for bound in bounds))


def assumed_range(length: int) -> Callable[..., range]:
    """Return a ``range`` that takes a bound which is not known for a given number."""

    def function(*bounds: Any) -> range:
        return range(*(length if issubclass(type(bound), Value) else bound for bound in bounds))

    return function


IN_SYMBOLIC_TRACES: Mapping[str, Any] = {"type": _Type, "len": _symbolic_len}
IN_EAGER_TRACES: Mapping[str, Any] = {"len": _eager_len, "range": _eager_range}
_FUNCTIONS = dict(vars(math))
"""The functions of ``math``, whatever else replaces them meanwhile."""


class _Math:
    """The module ``math`` with functions that follow symbolic numbers."""

    def __getattr__(self, name: str) -> Any:
        return _following_numbers(name) if callable(getattr(math, name)) else getattr(math, name)


def _following_numbers(name: str) -> Callable[..., Any]:
    original = _FUNCTIONS[name]

    def function(*args: Any, **kwargs: Any) -> Any:
        number = next((value for value in args if isinstance(value, AttributeFloat)), None)
        if number is None or kwargs:
            return getattr(math, name)(*args, **kwargs)  # the present one: torch.fx replaces it too
        return computed(original, args, number.builder)

    return function


def builtins_patched(modules: Iterable[nn.Module], builtins: Mapping[str, Any]) -> Any:
    """Let the source files of the classes of some modules find other builtins, and another ``math``."""
    names = {str(kind.__module__) for kind in {type(module) for module in modules} for kind in kind.__mro__}
    own = [name for name in names if name.partition(".")[0] not in ("torch", "builtins", "biofx")]
    files = [file for file in map(sys.modules.get, own) if is_of(file, ModuleType)]
    places: list[tuple[Any, str, Any]] = []
    for space in map(attributes_of, files):
        for name, value in space.items():
            if value is math:
                places.append((space, name, _Math()))
            elif type(value) is BuiltinFunctionType and value.__module__ == "math":
                places.append((space, name, _following_numbers(value.__name__)))
        places += [(space, name, value) for name, value in builtins.items() if name not in space]
    return replaced(places)


# torch.finfo and torch.iinfo


def type_limits_followed(limit: Callable[[Any, str], Any], kind: type = SymDtype) -> Any:
    """Let ``torch.finfo`` and ``torch.iinfo`` of a proxy for a type have other attributes.

    Args:
        limit: returns an attribute (``min``, ``eps``, …) for a proxy.
        kind: the class of the proxies.
    """

    def followed(original: Any) -> Callable[..., Any]:
        def limits(*args: Any, **kwargs: Any) -> Any:
            dtype = next(iter([*args, *kwargs.values()]), None)
            return _Limits(dtype, limit) if isinstance(dtype, kind) else original(*args, **kwargs)

        return limits

    return replaced([(torch, "finfo", followed(torch.finfo)), (torch, "iinfo", followed(torch.iinfo))])


class _Limits:
    """The limits of a type, as ``torch.finfo`` returns them."""

    def __init__(self, dtype: Any, limit: Callable[[Any, str], Any]) -> None:
        self._dtype = dtype
        self._limit = limit

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._limit(self._dtype, name)


# torch.utils.checkpoint

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


# autograd functions

KEPT_APPLY = (
    "applies {}, an autograd function, by an apply() that it has kept where capturing does not find it"
)
"""What a model does whose ``apply`` cannot be intercepted."""


@contextmanager
def applications_handled(
    handler: Handler, modules: Iterable[nn.Module], refuse: Callable[[str], None] | None
) -> Iterator[None]:
    """Let ``handler(original, function, args, kwargs)`` apply every autograd function.

    A model may have kept ``apply`` under a name of its own, as in ``relu = MyRelu.apply``. That is the method
    of ``torch.autograd.Function``, and the one that it calls is replaced; where it is a builtin and calls
    none, it is replaced where the modules can find it.

    Args:
        handler: does it.
        modules: those whose forwards apply functions.
        refuse: is handed what a builtin does that was found nowhere; None to let it.
    """
    base: Any = CLASS_THAT_APPLIES
    running: list[Any] = []

    def handled(cls: Any, *args: Any, **kwargs: Any) -> Any:
        def original(*given: Any, **named: Any) -> Any:
            running.append(cls)
            try:
                return super(base, cls).apply(*given, **named)
            finally:
                running.pop()

        return handler(original, cls, args, kwargs)

    def read(cls: Any, name: str) -> Any:
        if name == READ_BY_APPLY and not running and refuse is not None:
            refuse(KEPT_APPLY.format(cls.__name__))
        return type.__getattribute__(cls, name)

    places: list[tuple[Any, str, Any]] = [(base, "apply", classmethod(handled))]
    if APPLY_IS_BUILTIN:
        places += [(*place, functools.partial(handled, cls)) for *place, cls in _kept_applications(modules)]
        places.append((FunctionMeta, "__getattribute__", read))
    with replaced(places):
        yield


def _kept_applications(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, str, type]]:
    """Yield where modules can find an ``apply`` that is a builtin, its name there, and its class."""
    modules = list(modules)
    found: dict[tuple[int, str], tuple[Any, str, type]] = {}
    for place, name in itertools.chain(_names_found(modules), _own(modules)):
        held = _held(place, name)
        if type(held) is BuiltinFunctionType and held.__name__ == "apply":
            function: Any = held.__self__
            if is_of(function, FunctionMeta):
                found[id(place), name] = place, name, function
    yield from found.values()


def _own(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, str]]:
    for module in modules:
        attributes = attributes_of(module)
        yield from ((attributes, name) for name in list(attributes))


def can_be_applied(function: type[torch.autograd.Function]) -> bool:
    """Whether an autograd function has the ``apply`` of ``torch.autograd.Function``, not one of its own."""
    return next(kind for kind in function.__mro__ if "apply" in vars(kind)) is torch.autograd.Function


# cached functions

_Cached: Any = functools._lru_cache_wrapper


def caches_bypassed(modules: Iterable[nn.Module]) -> Any:
    """Let the forwards of some modules find cached functions that do not cache what belongs to the capture.

    A cached proxy or tensor of the capture would be returned after it, in the original model. With arguments
    that are known, a function is called as usual and returns what every call of the model gets; with others
    it is computed again.
    """
    places: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    for place, name in _names_found(modules):
        held = _held(place, name)
        if type(held) is _Cached:
            places[id(place), name] = place, name, _WithoutCache(held)
    return replaced(places.values())


def _names_found(modules: Iterable[nn.Module]) -> Iterator[tuple[Any, str]]:
    """Yield where the forwards of modules that are not torch's may find something, and its name there."""
    for kind in {type(module) for module in modules if package_of(type(module)) != "torch"}:
        yield from globals_mentioned(kind, of_libraries=True)
        yield from ((base, name) for base in bases_outside_torch(kind) for name in vars(base))


class _WithoutCache:
    """Replaces a cached function; itself not a function, as ``lru_cache`` returns none."""

    def __init__(self, cached: Any) -> None:
        self._cached = cached
        functools.update_wrapper(self, cached)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(_is_of_the_capture(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            return self._cached.__wrapped__(*args, **kwargs)
        with DisableTorchFunction():
            return self._cached(*args, **kwargs)

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else functools.partial(self, owner)


def _is_of_the_capture(value: Any) -> bool:
    sizes = value if is_of(value, torch.Size) else (value,)  # not every version of pytree looks into these
    return is_of(value, (Tensor, torch.fx.Proxy, nn.Module)) or any(map(is_symbolic, sizes))
