"""Looking at objects of anybody's without running a method of theirs.

A model holds whatever its author likes: loggers, arrays, lazy modules, mocks. ``isinstance``, ``hasattr``,
``len``, ``==`` and iteration ask the object, and its answer may be an exception, or change it. Here only its
type is asked, and what Python itself keeps for it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import sysconfig
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from types import GetSetDescriptorType, MemberDescriptorType, ModuleType, SimpleNamespace
from typing import Any

Kinds = type | tuple[type, ...]
_OF_NOBODY: frozenset[type] = frozenset(
    {
        *(bool, int, float, complex, str, bytes, bytearray, type(None)),
        *(tuple, list, dict, set, frozenset, deque, OrderedDict, defaultdict, Counter),
        *(SimpleNamespace, argparse.Namespace),
    }
)
"""Classes of Python's whose objects are nothing but what is in them."""
_FOLDERS = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_of(value: object, kinds: Kinds) -> bool:
    """Whether the type of a value is one of some kinds, whatever the value says of itself."""
    return issubclass(type(value), kinds)


def is_exactly(value: object, kinds: frozenset[type]) -> bool:
    """Whether the type of a value is among some that are hashed by identity."""
    kind: Any = type(value)
    of_classes: Any = type.__hash__
    return type(kind).__hash__ is of_classes and kind in kinds


def attributes_of(value: object) -> dict[str, Any]:
    """Return the attributes that an object keeps in a dict of its own; none if it has none."""
    for kind in _lineage(type(value)):
        descriptor = type.__getattribute__(kind, "__dict__").get("__dict__")
        if type(descriptor) in (GetSetDescriptorType, MemberDescriptorType):
            found: dict[str, Any] = descriptor.__get__(value)
            return found
        if descriptor is not None:
            break  # a property of its own
    return {}


def bytes_of(value: Any) -> bytes | None:
    """Return what is in an array of NumPy's or Python's, None for anything else."""
    if is_of(value, bytearray):
        return bytes(memoryview(value))
    arrays = [(sys.modules.get("numpy"), "ndarray"), (sys.modules.get("array"), "array")]
    for module, name in arrays:
        kind: Any = attributes_of(module).get(name)
        if is_of(kind, type) and is_of(value, kind):
            found: bytes = kind.tobytes(value)
            return found
    return None


def is_of_a_library(value: object, own_packages: frozenset[str]) -> bool:
    """Whether a value is a module of Python, a type, or an object of a class that a library brings.

    Args:
        value: the value.
        own_packages: names of packages that count as the user's, wherever they are installed.
    """
    if is_of(value, (ModuleType, type)):
        return True
    if is_exactly(value, _OF_NOBODY):
        return False
    name = package_of(type(value))
    return name not in own_packages and is_installed(name)


def package_of(kind: type) -> str:
    """Return the name of the outermost package in which a class is defined."""
    found = vars(type)["__module__"].__get__(kind)
    return found.partition(".")[0] if type(found) is str else "builtins"


def packages_of(kinds: Iterable[type]) -> frozenset[str]:
    """Return the outermost packages in which classes, and those that they derive from, are defined."""
    return frozenset(package_of(base) for kind in kinds for base in _lineage(kind))


@functools.lru_cache(maxsize=4096)
def is_installed(package: str) -> bool:
    """Whether a package comes with Python or was installed, and is not the user's own source."""
    if package == "__main__":
        return False
    if package in sys.stdlib_module_names:
        return True
    file = attributes_of(sys.modules.get(package)).get("__file__")
    return type(file) is str and is_a_file_of_a_library(file)


def is_a_file_of_a_library(file: str) -> bool:
    """Whether a source file is Python's own, or lies where packages are installed."""
    return file.startswith((*_FOLDERS, "<frozen "))


def _lineage(kind: type) -> tuple[type, ...]:
    found: tuple[type, ...] = type.__getattribute__(kind, "__mro__")
    return found
