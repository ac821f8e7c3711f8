"""What a forward leaves behind: random numbers drawn, attributes of modules changed."""

from __future__ import annotations

import random
import sys
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from biofx.capturing.containers import content_of, fill_again
from biofx.capturing.own_generators import OwnGenerator, generator_in
from biofx.capturing.shared_state import held_at, named, put_back, shared_places
from biofx.errors import CaptureError


class Watch:
    """Notices what a forward does besides computing: each would happen once, while it is captured."""

    def __init__(self, root: nn.Module, prefix: str = "") -> None:
        self.allowed: set[tuple[str, str]] = set()
        """Paths of modules and names of their attributes whose change does not count."""
        self._root = root
        self._prefix = prefix
        self._kept: list[Any] = []
        self._contained: dict[int, list[tuple[Any, Any]]] = {}
        self._generators: dict[int, list[tuple[OwnGenerator, bytes]]] = {}
        self._shared = {
            kind: [(place, held_at(place)) for place in shared_places(kind)]
            for kind in {type(module) for module in root.modules()}
        }
        self._module = 0
        self._is_complete = False
        self._before = self._attributes()
        self._is_complete = True
        self._random = _random_states()
        self._held = {
            id(module): [(held, dict(held)) for held in _holders(module)] for module in root.modules()
        }

    def restore(self, within: nn.Module | None = None) -> None:
        """Put everything that modules hold back to where it was; those within one, or all."""
        for module in (self._root if within is None else within).modules():
            for held, before in self._held.get(id(module), ()):
                if held.keys() != before.keys() or any(held[name] is not before[name] for name in before):
                    flag = held.get("training")
                    held.clear()
                    held.update(before)
                    if flag is not None:  # whoever follows the flags puts them back
                        held["training"] = flag
            for container, content in self._contained.get(id(module), ()):
                fill_again(container, content)
            for generator, state in self._generators.get(id(module), ()):
                generator.restore(state)
            for place, value in self._shared.get(type(module), ()):
                put_back(place, value)

    def changed_modules(self) -> list[str]:
        """Return the paths of the modules in which the forward left something."""
        found = self._attributes()
        return [path for path, attributes in found.items() if attributes != self._expected(path)]

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
        for path, found in self._attributes().items() if attributes else ():
            before = self._expected(path)
            for name in [*found, *before]:
                if found.get(name) != before.get(name):
                    place = ".".join(part for part in (self._prefix, path) if part)
                    owner = f"module {place!r}" if place else "the model"
                    raise CaptureError(
                        f"the forward of {owner} changes its attribute {name!r}, which a graph would do once "
                        "and never again. Return the value or make it a buffer that is changed in place, or "
                        "name the module in opaque=[…]"
                    )

    def _expected(self, path: str) -> dict[str, Any]:
        """Return what the attributes of a module are to be, comparable."""
        before = self._before.get(path, {})
        return {name: value for name, value in before.items() if (path, name) not in self.allowed}

    def _attributes(self) -> dict[str, dict[str, Any]]:
        """Return, for each attribute of each module, what it is and what it holds, comparable."""
        seen: set[int] = set()
        found: dict[str, dict[str, Any]] = {}
        for path, module in self._root.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._module = id(module)
                found[path] = {
                    name: self._contents(value, seen)
                    for held in _holders(module)
                    for name, value in held.items()
                    if self._is_watched(path, name)
                }
                for place in shared_places(type(module)):
                    found[path][named(place)] = self._contents(held_at(place), set())
        return found

    def _is_watched(self, path: str, name: str) -> bool:
        kept_apart = name in _KEPT_APART or name.startswith("_tensor_constant")
        return not kept_apart and (path, name) not in self.allowed

    def _contents(self, value: Any, seen: set[int]) -> Any:
        self._kept.append(value)  # alive, so that no id is used twice
        if type(value) in _INDIVISIBLE:
            return id(value)
        if id(value) in seen or isinstance(value, (nn.Module, Tensor, type, str, bytes)):
            return id(value)
        if isinstance(value, (dict, list, set, deque)):
            if not self._is_complete:
                self._contained.setdefault(self._module, []).append((value, content_of(value)))
            if not value:
                seen.add(id(value))
                return id(value)
        if isinstance(value, dict):
            inner = [(id(key), entry) for key, entry in dict.items(value)]
        elif isinstance(value, (list, tuple, deque)):
            inner = list(enumerate(value))
        elif isinstance(value, (set, frozenset)):
            return (id(value), frozenset(map(id, value)))
        elif (generator := generator_in(value)) is not None:
            if not self._is_complete:
                self._generators.setdefault(self._module, []).append((generator, generator.state()))
            return (id(value), generator.state())
        elif hasattr(value, "tobytes"):
            return (id(value), hash(value.tobytes()))
        else:
            inner = list(enumerate(getattr(value, "__dict__", {}).values())) if not callable(value) else []
        seen.add(id(value))
        return (
            (id(value), tuple((key, self._contents(entry, seen)) for key, entry in inner))
            if inner
            else id(value)
        )


_INDIVISIBLE = frozenset({int, float, complex, bool, str, bytes, type(None), nn.Parameter, Tensor})
_KEPT_APART = frozenset({"training", "_parameters", "_buffers", "_modules"})


def _holders(module: nn.Module) -> tuple[dict[str, Any], ...]:
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
