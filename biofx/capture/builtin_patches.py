"""Patches for ``type``, ``len``, ``range``, ``math`` and ``torch.finfo`` while forwards are captured.

Python's functions read a number or a class out of whatever they are handed. These return what a proxy is
traced for, and numbers that remember their nodes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from biofx.capture.proxies import ValueProxy
from biofx.capture.symbolic_scalars import AttributeFloat, SymDtype, computed
from biofx.static_inspection import attributes_of, is_of


class _TypeMeta(type):
    """Makes a class that is called, and used in ``isinstance``, as ``type`` is."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and issubclass(type(args[0]), ValueProxy):
            return args[0].traced_type()
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class _Type(metaclass=_TypeMeta):
    """``type``, which answers for a proxy with the class that it is traced for."""


def _symbolic_len(value: Any) -> Any:
    return value.length() if issubclass(type(value), ValueProxy) else len(value)


def _eager_len(value: Any) -> Any:
    return value.size(0) if isinstance(value, Tensor) and value.dim() else len(value)


def _eager_range(*bounds: Any) -> range:
    """Return a range; how long it is decides what Python does, so each bound is a decision."""
    return range(*(int(bound) if isinstance(bound, int) else bound for bound in bounds))


IN_SYMBOLIC_TRACES: Mapping[str, Any] = {"type": _Type, "len": _symbolic_len}
IN_EAGER_TRACES: Mapping[str, Any] = {"len": _eager_len, "range": _eager_range}
_FUNCTIONS = dict(vars(math))
"""The functions of ``math``, whatever else is put in their place meanwhile."""


class _Math:
    """The module ``math`` with functions that follow symbolic numbers."""

    def __getattr__(self, name: str) -> Any:
        return _following_numbers(name) if callable(getattr(math, name)) else getattr(math, name)


def _following_numbers(name: str) -> Callable[..., Any]:
    original = _FUNCTIONS[name]

    def function(*args: Any, **kwargs: Any) -> Any:
        number = next((value for value in args if isinstance(value, AttributeFloat)), None)
        if number is None or kwargs:
            return getattr(math, name)(*args, **kwargs)  # the present one: torch.fx patches it too
        return computed(original, args, number.graph)

    return function


@contextmanager
def builtins_patched(modules: Iterable[nn.Module], builtins: Mapping[str, Any]) -> Iterator[None]:
    """Let the source files of the classes of some modules find other builtins, and another ``math``."""
    names = {str(kind.__module__) for kind in {type(module) for module in modules} for kind in kind.__mro__}
    own = [name for name in names if name.partition(".")[0] not in ("torch", "builtins", "biofx")]
    files = [sys.modules.get(name) for name in own]
    missing = object()
    replaced: list[tuple[dict[str, Any], str, Any]] = []

    def replace(space: dict[str, Any], name: str, by: Any) -> None:
        replaced.append((space, name, space.get(name, missing)))
        space[name] = by

    for space in (attributes_of(file) for file in files if is_of(file, ModuleType)):
        for name, value in list(space.items()):
            if value is math:
                replace(space, name, _Math())
            elif type(value) is BuiltinFunctionType and value.__module__ == "math":
                replace(space, name, _following_numbers(value.__name__))
        for name in builtins.keys() - space.keys():
            replace(space, name, builtins[name])
    try:
        yield
    finally:
        for space, name, value in replaced:
            if value is missing:
                space.pop(name, None)
            else:
                space[name] = value


@contextmanager
def type_limits_followed(limit: Callable[[Any, str], Any], kind: type = SymDtype) -> Iterator[None]:
    """Let ``torch.finfo`` and ``torch.iinfo`` of a proxy for a type have other attributes.

    Args:
        limit: returns the attribute (``min``, ``eps``, …) of a proxy.
        kind: the class of the proxies.
    """
    originals = torch.finfo, torch.iinfo

    def followed(original: Any) -> Callable[..., Any]:
        def limits(*args: Any, **kwargs: Any) -> Any:
            dtype = next(iter([*args, *kwargs.values()]), None)
            return _Limits(dtype, limit) if isinstance(dtype, kind) else original(*args, **kwargs)

        return limits

    torch.finfo, torch.iinfo = map(followed, originals)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.finfo, torch.iinfo = originals  # type: ignore[misc]


class _Limits:
    """The limits of a type, as ``torch.finfo`` returns them."""

    def __init__(self, dtype: Any, limit: Callable[[Any, str], Any]) -> None:
        self._dtype = dtype
        self._limit = limit

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._limit(self._dtype, name)
