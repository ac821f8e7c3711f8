"""What forwards find under the names of ``type``, ``len`` and ``range`` while they are captured.

The ones of Python's answer with a plain type or number, or not at all. These answer with what a stand-in
stands for, and with a length that remembers where it comes from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from biofx.capture.values import Value
from biofx.unasked import attributes_of, is_of


class _Answering(type):
    """Makes a class that is called, and asked, as ``type`` is."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and issubclass(type(args[0]), Value):
            return args[0].stands_for()
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class _TypeOf(metaclass=_Answering):
    """What forwards find under the name ``type``."""


def _length_of(value: Any) -> Any:
    return value.length() if issubclass(type(value), Value) else len(value)


def _remembered_length_of(value: Any) -> Any:
    return value.size(0) if isinstance(value, Tensor) and value.dim() else len(value)


def _range_asked_for(*bounds: Any) -> range:
    """Return a range; how long it is decides what Python does, so the bounds are asked for as numbers."""
    return range(*(int(bound) if isinstance(bound, int) else bound for bound in bounds))


WHEN_TRACED: Mapping[str, Any] = {"type": _TypeOf, "len": _length_of}
WHEN_RECORDED: Mapping[str, Any] = {"len": _remembered_length_of, "range": _range_asked_for}


@contextmanager
def questions_answered(modules: Iterable[nn.Module], answers: Mapping[str, Any]) -> Iterator[None]:
    """Let the source files that define the classes of some modules find other builtins meanwhile."""
    files = {str(kind.__module__) for kind in {type(module) for module in modules} for kind in kind.__mro__}
    found = [sys.modules.get(name) for name in files if name.partition(".")[0] not in ("torch", "builtins")]
    spaces = [attributes_of(file) for file in found if is_of(file, ModuleType)]
    replaced = [(space, name) for space in spaces for name in answers if name not in space]
    for namespace, name in replaced:
        namespace[name] = answers[name]
    try:
        yield
    finally:
        for namespace, name in replaced:
            namespace.pop(name, None)
