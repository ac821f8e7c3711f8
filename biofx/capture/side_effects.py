"""What a forward leaves behind: random numbers drawn, attributes of modules changed."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from biofx.capture.own_generators import OwnGenerator, generator_in
from biofx.capture.shared_state import held_at, named, put_back, shared_places
from biofx.errors import CaptureError
from biofx.static_inspection import (
    attributes_of,
    bytes_of,
    content_of,
    is_exactly,
    is_of,
    is_of_a_library,
    packages_of,
    restore_content,
)


class Watch:
    """Notices what a forward does besides computing: each would happen once, while it is captured."""

    def __init__(self, root: nn.Module, prefix: str = "") -> None:
        self.allowed: set[tuple[str, str]] = set()
        """Paths of modules and names of their attributes whose change does not count."""
        self._root = root
        self._prefix = prefix
        self._kept: list[Any] = []
        self._around: list[Any] = []
        kinds = {type(module) for module in root.modules()}
        self._packages = packages_of(kinds) - {"torch"}
        self._inside: dict[int, _Inside] = {}
        self._random = _random_states()
        self._inside_shared = {kind: _Inside() for kind in kinds}
        self._shared = {
            kind: [
                (place, held_at(place), self._contents(held_at(place), set(), self._inside_shared[kind]))
                for place in shared_places(kind)
            ]
            for kind in kinds
        }
        seen: set[int] = set()
        self._paths: dict[str, nn.Module] = {}
        self._held: dict[int, list[_Held]] = {}
        for path, module in root.named_modules():
            self._held[id(module)] = [
                _Held(held, dict(held), self._all_contents(module, held, seen)) for held in holders_of(module)
            ]
            if not isinstance(module, torch.jit.ScriptModule):
                self._paths[path] = module

    def restore(self, within: nn.Module | None = None) -> None:
        """Put everything that modules hold back to where it was; those within one, or all."""
        for module in (self._root if within is None else within).modules():
            for held in self._held.get(id(module), ()):
                held.restore()
            self._inside.get(id(module), _Inside()).put_back()
            self._inside_shared.get(type(module), _Inside()).put_back()
            for place, value, _ in self._shared.get(type(module), ()):
                put_back(place, value)

    def changed_modules(self) -> list[str]:
        """Return the paths of the modules in which the forward left something."""
        return list(dict.fromkeys(path for path, _ in self._changes()))

    def refuse_side_effects(self, *, torch_draws: bool = False, attributes: bool = True) -> None:
        """Raise a CaptureError if the forward drew random numbers or left something in a module.

        Args:
            torch_draws: let torch's random numbers not count: where a forward runs, they are drawn.
            attributes: whether to look for what was left in modules.
        """
        drawn = [
            name
            for name, state in _random_states().items()
            if state != self._random[name] and not (torch_draws and name == "torch")
        ]
        if drawn:
            raise CaptureError(
                f"the model's forward draws from the random numbers of {' and '.join(drawn)}, which a graph "
                "would do once and never again. Draw tensors with torch, or name the module in opaque=[…]"
            )
        for path, name in self._changes() if attributes else ():
            place = ".".join(part for part in (self._prefix, path) if part)
            owner = f"module {place!r}" if place else "the model"
            raise CaptureError(
                f"the forward of {owner} changes its attribute {name!r}, which a graph would do once "
                "and never again. Return the value or make it a buffer that is changed in place, or "
                "name the module in opaque=[…]"
            )

    def _changes(self) -> Iterator[tuple[str, str]]:
        """Yield the paths of modules, and the attributes of them that are not what they were."""
        seen: set[int] = set()
        shared = {kind: list(self._shared_changes(kind)) for kind in self._shared}
        for path, module in self._paths.items():
            for held in self._held[id(module)]:
                for name in held.names_changed(lambda value: self._contents(value, seen)):
                    if self._is_watched(path, name):
                        yield path, name
            for name in shared.get(type(module), ()):
                yield path, name

    def _shared_changes(self, kind: type) -> Iterator[str]:
        """Yield the names of what modules of a class share, and what is not what it was."""
        for place, value, contents in self._shared[kind]:
            found = held_at(place)
            if found is not value or self._contents(found, set()) != contents:
                yield named(place)

    def _all_contents(self, module: nn.Module, held: dict[str, Any], seen: set[int]) -> dict[str, Any]:
        """Return what the attributes hold that something can be put into."""
        inside = self._inside.setdefault(id(module), _Inside())
        return {
            name: self._contents(value, seen, inside)
            for name, value in held.items()
            if not is_exactly(value, _INDIVISIBLE) and not is_of(value, nn.Module)
        }

    def _is_watched(self, path: str, name: str) -> bool:
        kept_apart = name in _KEPT_APART or name.startswith("_tensor_constant")
        return not kept_apart and (path, name) not in self.allowed

    def _contents(self, value: Any, seen: set[int], inside: _Inside | None = None) -> Any:
        """Return what something holds, comparable; what can be put back goes into ``inside``."""
        if is_exactly(value, _CONTAINERS) and not value:  # as most are
            if inside is not None:
                inside.containers.append((value, []))
            return ()
        if is_exactly(value, _INDIVISIBLE):
            self._kept.append(value)  # alive, so that no id is used twice
            return id(value)
        self._kept.append(value)
        if id(value) in seen or is_of(value, (nn.Module, Tensor, type, str, bytes)):
            return id(value)
        if is_of(value, (dict, list, set, deque)):
            content = content_of(value)
            if inside is not None:
                inside.containers.append((value, content))
            if not content:
                return ()
        seen.add(id(value))
        if is_of(value, dict):
            inner = [(id(key), entry) for key, entry in content_of(value)]
        elif is_of(value, (list, tuple, deque)):
            inner = list(enumerate(content_of(value)))
        elif is_of(value, (set, frozenset)):
            return (id(value), frozenset(map(id, content_of(value))))
        elif (generator := generator_in(value)) is not None:
            if inside is not None:
                inside.generators.append((generator, generator.state()))
            return (id(value), generator.state())
        elif (held := bytes_of(value)) is not None:
            return (id(value), hash(held))
        elif callable(value) or is_of_a_library(value, self._packages):
            return id(value)
        else:
            attributes = attributes_of(value)
            if inside is not None and attributes:
                inside.containers.append((attributes, content_of(attributes)))
            inner = [(id(name), entry) for name, entry in content_of(attributes)]
        if len(self._around) >= _DEEPEST:
            return id(value)
        self._around.append(value)
        found = tuple((key, self._contents(entry, seen, inside)) for key, entry in inner)
        self._around.pop()
        return (id(value), found) if inner else id(value)


@dataclass(frozen=True)
class _Inside:
    """What the attributes of a module lead to that can be put back."""

    containers: list[tuple[Any, list[Any]]] = field(default_factory=list)
    """Dicts, lists, sets and deques, and what was in them."""
    generators: list[tuple[OwnGenerator, bytes]] = field(default_factory=list)
    """Generators of random numbers, and their states."""

    def put_back(self) -> None:
        """Put it all back to where it was."""
        for container, content in self.containers:
            restore_content(container, content)
        for generator, state in self.generators:
            generator.restore(state)


@dataclass(frozen=True)
class _Held:
    """One of the dictionaries in which a module has its attributes, as it was."""

    live: dict[str, Any]
    before: dict[str, Any]
    contents: dict[str, Any]
    """Of the attributes that something can be put into, what they held."""

    def names_changed(self, contents_of: Callable[[Any], Any]) -> Iterator[str]:
        """Yield the names of the attributes that are others now, are new or gone, or hold something else."""
        live, before = self.live, self.before
        for name, value in live.items():
            if name not in before or value is not before[name]:
                yield name
        if len(before) != len(live) or before.keys() != live.keys():
            yield from (name for name in before if name not in live)
        for name, content in self.contents.items():
            value = live.get(name)
            if value is not before[name] or (is_exactly(value, _CONTAINERS) and not (value or content)):
                continue
            if contents_of(value) != content:
                yield name

    def restore(self) -> None:
        """Put every attribute back."""
        held, before = self.live, self.before
        if held.keys() != before.keys() or any(held[name] is not before[name] for name in before):
            flag = held.get("training")
            held.clear()
            held.update(before)
            if flag is not None:  # whoever follows the flags puts them back
                held["training"] = flag


_INDIVISIBLE: frozenset[type] = frozenset(
    {int, float, complex, bool, str, bytes, type(None), nn.Parameter, Tensor}
)
_DEEPEST = 100
"""How deep to look into what lies in one another, a count."""
_CONTAINERS: frozenset[type] = frozenset({dict, OrderedDict, list, set, deque})
_KEPT_APART = frozenset({"training", "_parameters", "_buffers", "_modules"})


def holders_of(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return the dicts in which a module holds what it has: attributes, parameters, buffers, modules."""
    parameters: dict[str, Any] = module._parameters
    buffers: dict[str, Any] = module._buffers
    modules: dict[str, Any] = module._modules
    return vars(module), parameters, buffers, modules


def _random_states() -> dict[str, Any]:
    """Return the states of the global random number generators, comparable."""
    states: dict[str, Any] = {"Python": random.getstate(), "torch": torch.get_rng_state().numpy().tobytes()}
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    if numpy_random is not None:
        kind, keys, *rest = numpy_random.get_state()
        states["NumPy"] = (kind, keys.tobytes(), *rest)
    return states
