"""What forwards can change outside of the modules of a model: globals, and attributes of their classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from biofx.capture.attribute_reads import ObservedAttribute
from biofx.capture.bytecode import globals_mentioned
from biofx.static_inspection import is_of, is_of_a_library, packages_of

Place = tuple[Any, str]
"""The globals of a source file, or a class, and a name there."""
_known: WeakKeyDictionary[type[nn.Module], tuple[Place, ...]] = WeakKeyDictionary()


def shared_places(kind: type[nn.Module]) -> tuple[Place, ...]:
    """Return where forwards of a class find what they share with others, and may change."""
    if kind not in _known:
        _known[kind] = () if _is_torchs(kind) else tuple(_found(kind))
    return _known[kind]


def held_at(place: Place) -> Any:
    """Return what is at a place, None if nothing is any more."""
    space, name = place
    found: Any = (vars(space) if is_of(space, type) else space).get(name)
    return found.of_class if is_of(found, ObservedAttribute) else found


def named(place: Place) -> str:
    """Return what to call a place in a message."""
    space, name = place
    return f"{name} of {space.__name__ if isinstance(space, type) else space.get('__name__')}"


def put_back(place: Place, value: Any) -> None:
    """Let a place hold what it held."""
    space, name = place
    if held_at(place) is value:
        return
    if isinstance(space, type):
        setattr(space, name, value)
    else:
        space[name] = value


def _found(kind: type[nn.Module]) -> Iterator[Place]:
    seen: set[tuple[int, str]] = set()
    own = packages_of([kind]) - {"torch"}
    for place in (*globals_mentioned(kind), *_attributes_of(kind)):
        key = (id(place[0]), place[1])
        if key not in seen and _may_change(held_at(place), own):
            seen.add(key)
            yield place


def _may_change(value: Any, own_packages: frozenset[str]) -> bool:
    """Whether forwards may give something else in the place of a value, or put something into it."""
    if is_of(value, Tensor):
        return True
    return not (callable(value) or is_of(value, nn.Module) or is_of_a_library(value, own_packages))


def _attributes_of(kind: type[nn.Module]) -> Iterator[Place]:
    for base in kind.__mro__:
        if not _is_torchs(base):
            yield from ((base, name) for name in vars(base) if not name.startswith("__"))


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")
