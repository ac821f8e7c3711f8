"""Inspection of objects without running any of their methods.

A model holds whatever its author likes: loggers, arrays, lazy modules, mocks. ``isinstance``, ``hasattr``,
``len``, ``==`` and iteration call methods of such an object, which may raise, or change it. The functions
here look only at its type and at what Python itself stores for it.
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
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, tuple, set, frozenset, deque)
_PLAIN: frozenset[type] = frozenset(
    {
        *(bool, int, float, complex, str, bytes, bytearray, type(None)),
        *(*_CONTAINERS, defaultdict, Counter, SimpleNamespace, argparse.Namespace),
    }
)
"""Classes of Python whose objects are nothing but what is in them."""
_FOLDERS = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_of(value: object, kinds: Kinds) -> bool:
    """Whether the type of a value is among ``kinds`` or derived from one, whatever its ``__class__`` says."""
    return issubclass(type(value), kinds)


def is_exactly(value: object, kinds: frozenset[type]) -> bool:
    """Whether the type of a value is one of ``kinds``, which are hashed by identity."""
    kind: Any = type(value)
    of_classes: Any = type.__hash__
    return type(kind).__hash__ is of_classes and kind in kinds


def attributes_of(value: object) -> dict[str, Any]:
    """Return the ``__dict__`` of an object; an empty dict if it has none."""
    for kind in _bases(type(value)):
        descriptor = type.__getattribute__(kind, "__dict__").get("__dict__")
        if type(descriptor) in (GetSetDescriptorType, MemberDescriptorType):
            found: dict[str, Any] = descriptor.__get__(value)
            return found
        if descriptor is not None:
            break  # a property of its own
    return {}


def bytes_of(value: Any) -> bytes | None:
    """Return the content of an array of NumPy's or Python's, None for anything else."""
    if is_of(value, bytearray):
        return bytes(memoryview(value))
    arrays = [(sys.modules.get("numpy"), "ndarray"), (sys.modules.get("array"), "array")]
    for module, name in arrays:
        kind: Any = attributes_of(module).get(name)
        if is_of(kind, type) and is_of(value, kind):
            found: bytes = kind.tobytes(value)
            return found
    return None


def content_of(container: Any) -> list[Any]:
    """Return the entries of a container of Python's, or of one derived from it; of a dict the items."""
    if is_of(container, dict):
        return list(dict.items(container))
    return list(_container_class(container).__iter__(container))


def restore_content(container: Any, content: list[Any]) -> None:
    """Fill a container with what :func:`content_of` returned earlier, unless that is what it holds."""
    found = content_of(container)
    if len(found) == len(content) and all(map(_is_the_same, found, content)):
        return
    kind = _container_class(container)
    kind.clear(container)
    if is_of(container, dict):
        for key, value in content:
            kind.__setitem__(container, key, value)
    elif is_of(container, set):
        kind.update(container, content)
    else:
        kind.extend(container, content)


def _container_class(container: Any) -> Any:
    return next(kind for kind in _CONTAINERS if is_of(container, kind))


def _is_the_same(found: Any, before: Any) -> bool:
    if isinstance(found, tuple) and isinstance(before, tuple) and len(found) == len(before) == 2:
        return found[0] is before[0] and found[1] is before[1]
    return found is before


def is_of_a_library(value: object, own_packages: frozenset[str]) -> bool:
    """Whether a value is a module of Python, a type, or an object of a class of a library.

    Args:
        value: the value.
        own_packages: names of packages that count as the user's, wherever they are installed.
    """
    if is_of(value, (ModuleType, type)):
        return True
    if is_exactly(value, _PLAIN):
        return False
    name = package_of(type(value))
    return name not in own_packages and is_installed(name)


def package_of(kind: type) -> str:
    """Return the name of the outermost package in which a class is defined."""
    found = vars(type)["__module__"].__get__(kind)
    return found.partition(".")[0] if type(found) is str else "builtins"


def packages_of(kinds: Iterable[type]) -> frozenset[str]:
    """Return the outermost packages in which classes and their bases are defined."""
    return frozenset(package_of(base) for kind in kinds for base in _bases(kind))


def bases_outside_torch(kind: type) -> list[type]:
    """Return a class and its bases, without those of torch and of Python."""
    return [base for base in _bases(kind) if package_of(base) not in ("torch", "builtins")]


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


def _bases(kind: type) -> tuple[type, ...]:
    found: tuple[type, ...] = type.__getattribute__(kind, "__mro__")
    return found
