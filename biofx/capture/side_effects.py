"""What a forward leaves behind: random numbers drawn, attributes of modules and of their classes changed."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.jit import ScriptModule

from biofx.capture.attribute_reads import ObservedAttribute
from biofx.capture.bytecode import globals_mentioned
from biofx.errors import CaptureError
from biofx.graph.regions import joined_path
from biofx.random_state import RandomGenerator, generator_in, global_generators
from biofx.static_inspection import (
    attributes_of,
    bases_outside_torch,
    bytes_of,
    content_of,
    is_exactly,
    is_of,
    is_of_a_library,
    packages_of,
    restore_content,
)


class Watch:
    """Notices the side effects of a forward, which would happen once, while it is captured.

    Args:
        root: the module whose forward runs.
        prefix: path of ``root`` in the whole model, for messages.
    """

    def __init__(self, root: nn.Module, prefix: str = "") -> None:
        self.allowed: set[tuple[str, str]] = set()
        """Paths of modules and names of attributes whose change does not count."""
        self._root = root
        self._prefix = prefix
        self._random = {name: (each, each.state()) for name, each in global_generators().items()}
        kinds = {type(module) for module in root.modules()}
        packages = packages_of(kinds) - {"torch"}
        self._shared = {kind: _Shared(kind, packages) for kind in kinds}
        seen: set[int] = set()
        self._attributes = {
            id(module): [_Attributes(held, packages, seen) for held in holders_of(module)]
            for module in root.modules()
        }
        self._paths = {
            path: module for path, module in root.named_modules() if not isinstance(module, ScriptModule)
        }

    def restore(self, within: nn.Module | None = None) -> None:
        """Restore everything that modules hold: that of the modules in one of them, or of all."""
        for module in (self._root if within is None else within).modules():
            for attributes in self._attributes.get(id(module), ()):
                attributes.restore()
            if type(module) in self._shared:
                self._shared[type(module)].restore()

    def changed_modules(self) -> list[str]:
        """Return the paths of the modules in which the forward changed an attribute."""
        return list(dict.fromkeys(path for path, _ in self._changes()))

    def refuse_side_effects(self, *, torch_draws: bool = False, attributes: bool = True) -> None:
        """Raise a CaptureError if the forward drew random numbers or changed an attribute of a module.

        Args:
            torch_draws: whether random numbers of torch are allowed.
            attributes: whether to look for changed attributes.
        """
        drawn = [
            name
            for name, (generator, before) in self._random.items()
            if generator.state() != before and not (torch_draws and name == "torch")
        ]
        if drawn:
            raise CaptureError(
                f"the model's forward draws from the random numbers of {' and '.join(drawn)}, which a graph "
                "would do once and never again. Draw tensors with torch, or name the module in opaque=[…]"
            )
        for path, name in self._changes() if attributes else ():
            place = joined_path(self._prefix, path)
            owner = f"module {place!r}" if place else "the model"
            raise CaptureError(
                f"the forward of {owner} changes its attribute {name!r}, which a graph would do once "
                "and never again. Return the value or make it a buffer that is changed in place, or "
                "name the module in opaque=[…]"
            )

    def _changes(self) -> Iterator[tuple[str, str]]:
        """Yield the paths of modules and the names of their attributes that have changed."""
        shared = {kind: places.changed() for kind, places in self._shared.items()}
        for path, module in self._paths.items():
            for attributes in self._attributes[id(module)]:
                yield from ((path, name) for name in attributes.changed() if self._is_watched(path, name))
            yield from ((path, name) for name in shared[type(module)])

    def _is_watched(self, path: str, name: str) -> bool:
        is_torchs = name in _TORCHS_OWN or name.startswith("_tensor_constant")
        return not is_torchs and (path, name) not in self.allowed


def holders_of(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the dicts in which a module holds attributes, parameters, buffers and modules."""
    return vars(module), module._parameters, module._buffers, module._modules


class _Attributes:
    """One of the dicts in which a module holds its attributes, and what it held at first."""

    def __init__(self, held: dict[str, Any], packages: frozenset[str], seen: set[int]) -> None:
        self._held = held
        self._before = dict(held)
        self._inside = _Contents(packages)
        for name, value in held.items():
            self._inside.note(name, value, seen)

    def changed(self) -> Iterator[str]:
        """Yield the names of attributes that were assigned, deleted, or changed in place."""
        held, before = self._held, self._before
        yield from (name for name in held if name not in before or held[name] is not before[name])
        yield from (name for name in before if name not in held)
        yield from (name for name in self._inside.changed() if held.get(name) is before[name])

    def restore(self) -> None:
        """Restore the attributes and what is in them."""
        held, before = self._held, self._before
        if held.keys() != before.keys() or any(held[name] is not before[name] for name in before):
            flag = held.get("training")
            held.clear()
            held.update(before)
            if flag is not None:  # a tracer that follows the flags restores them
                held["training"] = flag
        self._inside.restore()


class _Shared:
    """The places outside of modules that forwards of a class can change, and what they held at first."""

    def __init__(self, kind: type[nn.Module], packages: frozenset[str]) -> None:
        self._places = [(place, place.value) for place in shared_places(kind)]
        self._inside = _Contents(packages)
        for place, value in self._places:
            self._inside.note(place.label, value, set())

    def changed(self) -> list[str]:
        """Return the places that were assigned or changed in place, as messages name them."""
        assigned = [place.label for place, value in self._places if place.value is not value]
        return list(dict.fromkeys([*assigned, *self._inside.changed()]))

    def restore(self) -> None:
        """Restore the places and what is in them."""
        self._inside.restore()
        for place, value in self._places:
            place.restore(value)


class _Contents:
    """What can change in values in place: the containers, objects, generators and arrays that they lead to.

    Args:
        packages: packages whose classes are the user's; objects of other libraries are not looked into.
    """

    def __init__(self, packages: frozenset[str]) -> None:
        self._found: list[tuple[str, Any, Any]] = []
        """Names of values, what they lead to, and its entries, state or bytes."""
        self._packages = packages

    def note(self, name: str, value: Any, seen: set[int], depth: int = 0) -> None:
        """Note what a value leads to, except for what is in ``seen``: ids of containers and objects."""
        kind = type(value)
        if value is None or kind is bool or kind is int or kind is str:
            return  # most of what modules hold, and quicker here
        if (kind is OrderedDict or kind is dict) and not value:
            self._found.append((name, value, []))
            return
        if is_exactly(value, _INDIVISIBLE) or id(value) in seen:
            return
        if is_of(value, (nn.Module, Tensor, type, str, bytes)):
            return
        if is_of(value, (dict, list, set, deque)):
            self._note_container(name, value, seen, depth)
        elif is_of(value, tuple):
            seen.add(id(value))
            self._note_entries(name, content_of(value), seen, depth)
        elif (generator := generator_in(value)) is not None:
            self._found.append((name, generator, generator.state()))
        elif (held := bytes_of(value)) is not None:
            self._found.append((name, value, held))
        elif not (is_of(value, frozenset) or callable(value) or is_of_a_library(value, self._packages)):
            seen.add(id(value))
            self._note_container(name, attributes_of(value), seen, depth)

    def _note_container(self, name: str, container: Any, seen: set[int], depth: int) -> None:
        content = content_of(container)
        self._found.append((name, container, content))
        if not content:
            return
        seen.add(id(container))
        if is_of(container, dict):
            self._note_entries(name, [entry for _, entry in content], seen, depth)
        elif not is_of(container, set):
            self._note_entries(name, content, seen, depth)

    def _note_entries(self, name: str, entries: list[Any], seen: set[int], depth: int) -> None:
        for entry in entries if depth < _DEEPEST else ():
            self.note(name, entry, seen, depth + 1)

    def changed(self) -> list[str]:
        """Return the names of the values in which something has changed."""
        return list(
            dict.fromkeys(name for name, found, before in self._found if not _is_still(found, before))
        )

    def restore(self) -> None:
        """Restore containers, objects and generators; arrays stay as they are."""
        for _, found, before in self._found:
            if type(found) is RandomGenerator:
                found.restore(before)
            elif type(before) is list:
                restore_content(found, before)


def _is_still(found: Any, before: Any) -> bool:
    """Whether a container holds the same objects, or a generator or an array the same state, as before."""
    kind = type(found)
    if (kind is OrderedDict or kind is dict or is_exactly(found, _CONTAINERS)) and not before:  # as most are
        return not found
    if type(found) is RandomGenerator:
        return bool(found.state() == before)
    if type(before) is not list:
        return bool(bytes_of(found) == before)
    now = content_of(found)
    if is_of(found, set):
        return set(map(id, now)) == set(map(id, before))
    if is_of(found, dict):
        now, before = ([part for pair in pairs for part in pair] for pairs in (now, before))
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


_INDIVISIBLE: frozenset[type] = frozenset(
    {int, float, complex, bool, str, bytes, type(None), nn.Parameter, Tensor}
)
_DEEPEST = 100
"""How deep containers and objects inside one another are looked into, a count."""
_CONTAINERS: frozenset[type] = frozenset({dict, OrderedDict, list, set, deque})
_TORCHS_OWN = frozenset({"training", "_parameters", "_buffers", "_modules"})


@dataclass(frozen=True, eq=False)
class SharedPlace:
    """A place outside of the modules that forwards can change: a global, or an attribute of a class."""

    space: Any
    """The globals of a source file, or a class."""
    name: str

    @property
    def value(self) -> Any:
        """What is there now, None if nothing is."""
        space = vars(self.space) if is_of(self.space, type) else self.space
        found = space.get(self.name)
        return found.of_class if is_of(found, ObservedAttribute) else found

    @property
    def label(self) -> str:
        """The place as messages name it."""
        space = self.space
        return f"{self.name} of {space.__name__ if is_of(space, type) else space.get('__name__')}"

    def restore(self, value: Any) -> None:
        """Let the place hold a value, unless it does."""
        if self.value is value:
            return
        if is_of(self.space, type):
            setattr(self.space, self.name, value)
        else:
            self.space[self.name] = value


def shared_places(kind: type[nn.Module]) -> tuple[SharedPlace, ...]:
    """Return the globals and class attributes that forwards of a class use and may change."""
    if kind not in _shared_places:
        own = packages_of([kind]) - {"torch"}
        bases = bases_outside_torch(kind)
        attributes = ((base, name) for base in bases for name in vars(base) if not name.startswith("__"))
        places: dict[tuple[int, str], SharedPlace] = {}
        for space, name in (*globals_mentioned(kind), *attributes) if kind in bases else ():
            places.setdefault((id(space), name), SharedPlace(space, name))
        _shared_places[kind] = tuple(place for place in places.values() if _may_change(place.value, own))
    return _shared_places[kind]


_shared_places: WeakKeyDictionary[type[nn.Module], tuple[SharedPlace, ...]] = WeakKeyDictionary()


def _may_change(value: Any, packages: frozenset[str]) -> bool:
    """Whether forwards may assign another value in its place, or change it in place."""
    is_fixed = callable(value) or is_of(value, nn.Module) or is_of_a_library(value, packages)
    return is_of(value, Tensor) or not is_fixed
