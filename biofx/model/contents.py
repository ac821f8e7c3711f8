"""What attributes hold, in a form to compare with what they hold later."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class _Missing:
    """Stands for what an attribute holds that is not there."""

    def __repr__(self) -> str:
        return "nothing"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


@dataclass(frozen=True)
class IsNumber:
    """Any number will do."""

    def fits(self, found: Any) -> bool:
        """Whether a value is what is expected."""
        return isinstance(found, (int, float)) and not isinstance(found, bool)

    def __str__(self) -> str:
        return "a number"


@dataclass(frozen=True)
class IsOfType:
    """Anything of one class will do: what is in it is looked at by itself."""

    kind: type

    def fits(self, found: Any) -> bool:
        """Whether a value is what is expected."""
        return type(found) is self.kind

    def __str__(self) -> str:
        return f"a {self.kind.__name__}"


@dataclass(frozen=True, eq=False)
class IsEqual:
    """It has to be equal, and of the same type; what knows no equality has to be the same object."""

    value: Any

    def fits(self, found: Any) -> bool:
        """Whether a value is what is expected."""
        value = self.value
        if found is value:
            return True
        if type(found) is not type(value) or not isinstance(value, _COMPARED):
            return False
        return bool(found == value) or (value != value and found != found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IsEqual) and self.fits(other.value)

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __str__(self) -> str:
        return described(self.value)


_COMPARED = (
    *(*_PLAIN, frozenset, range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Types whose values are told apart by what they are."""


@dataclass(frozen=True)
class Holds:
    """A container or object has to hold what it held."""

    kind: type
    entries: tuple[tuple[Any, Any], ...]
    """Keys, places or names, and what is expected of the entries there."""

    def fits(self, found: Any) -> bool:
        """Whether a value is what is expected."""
        if type(found) is not self.kind:
            return False
        entries = list(_entries(found))
        return len(entries) == len(self.entries) and all(
            key == expected_key and expected.fits(entry)
            for (key, entry), (expected_key, expected) in zip(entries, self.entries, strict=True)
        )

    def __str__(self) -> str:
        is_row = issubclass(self.kind, (list, tuple, set, deque))
        inside = ", ".join(f"{entry}" if is_row else f"{key!r}: {entry}" for key, entry in self.entries)
        return f"a {self.kind.__name__} that holds {_shortened(inside) or 'nothing'}"


def expectation_of(value: Any, *, around: tuple[int, ...] = ()) -> Any:
    """Return what is expected of an attribute that holds a value."""
    if is_followed(value) and not around:
        return IsOfType(type(value))
    has_content = isinstance(value, _CONTAINERS) or _is_object(value) or _is_array(value)
    if not has_content or id(value) in around or len(around) > _DEEPEST or isinstance(value, frozenset):
        return IsEqual(value)
    inside = (*around, id(value))
    entries = tuple((key, expectation_of(entry, around=inside)) for key, entry in _entries(value))
    return Holds(type(value), entries)


def is_followed(value: Any) -> bool:
    """Whether a value is an object that can be told to say what is read from it."""
    return (
        _is_object(value) and type(value) is not SimpleNamespace and not hasattr(type(value), "__getattr__")
    )


def _is_object(value: Any) -> bool:
    """Whether a value is an object of somebody's class, that holds something."""
    kind = type(value)
    home = kind.__module__.partition(".")[0]
    is_written_in_python = kind.__flags__ & _HEAP_TYPE and not kind.__flags__ & _IMMUTABLE_TYPE
    return kind is SimpleNamespace or (
        bool(is_written_in_python)
        and home not in ("torch", "biofx", "numpy", "functools", "random")
        and not isinstance(value, (type, Tensor, nn.Module, enum.Enum, *_PLAIN, *_CONTAINERS))
        and not callable(value)
    )


def fields_of(value: Any) -> dict[str, Any]:
    """Return what an object holds, by name, without asking its class for any of it."""
    slots = (getattr(base, "__slots__", ()) for base in type(value).__mro__)
    names = [name for found in slots for name in ((found,) if isinstance(found, str) else found)]
    held: dict[str, Any] = {}
    for name in dict.fromkeys(("__dict__", *names)):
        try:
            found = object.__getattribute__(value, name)
        except AttributeError:
            continue
        held.update(found if name == "__dict__" else {name: found})
    return held


_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8
_DEEPEST = 5
"""How far objects are looked into that hold others, a count."""


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from dict.items(value)
    elif isinstance(value, set):
        yield None, frozenset(value)
    elif isinstance(value, (list, tuple, deque)):
        yield from enumerate(value)
    elif _is_array(value):
        yield from (("shape", str(value.shape)), ("dtype", str(value.dtype)), ("values", value.tobytes()))
    else:
        yield from fields_of(value).items()


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def described(value: Any) -> str:
    """Return a value as text, a long one cut short."""
    if isinstance(value, (Tensor, nn.Module)):
        return f"a {type(value).__name__}"
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:76]} …"
