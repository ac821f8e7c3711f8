"""Noticing what a forward reads from the attributes of modules, and of objects that modules hold.

Python looks an attribute up on the class before it looks into the instance, if what the class has there says
how to read it. So for as long as a forward is captured the classes of the modules have such an entry for each
attribute of theirs, and the classes of the objects another way to look attributes up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from biofx.capture.python_names import makes_texts, operands_read
from biofx.capture.tracked import is_tracked_value
from biofx.model.contents import MISSING, fields_of, is_followed


class Place:
    """Where a forward reads an attribute."""

    def __init__(self, frame: FrameType) -> None:
        self._code = frame.f_code
        self._step = frame.f_lasti
        self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        """File and line."""

    @property
    def is_operand(self) -> bool:
        """Whether what is read goes straight into arithmetic, and nowhere else."""
        return self._step in operands_read(self._code)

    @property
    def can_be_followed(self) -> bool:
        """Whether what is read is asked for wherever it decides something."""
        return not makes_texts(self._code)


class Follower(Protocol):
    """Who wants to know what a forward reads."""

    @property
    def is_following(self) -> bool:
        """Whether what happens now is part of a graph."""

    def attribute_read(self, owner: nn.Module, names: tuple[str, ...], value: Any, place: Place) -> Any:
        """Note a read of an attribute; return what to go on with in the place of its value."""


@contextmanager
def reads_noticed(modules: Iterable[nn.Module], follower: Follower) -> Iterator[None]:
    """Let a follower know of every attribute that is read from some modules meanwhile."""
    reads = _Reads(follower)
    try:
        reads.watch(modules)
        yield
    finally:
        reads.put_back()


class Observed:
    """What a class has in the place of an attribute of its instances."""

    def __init__(self, name: str, of_class: Any, reads: _Reads) -> None:
        self.of_class = of_class
        """What the class itself has under the name."""
        self._name = name
        self._reads = reads

    def __get__(self, module: nn.Module | None, kind: type | None = None) -> Any:
        if module is None:
            if self.of_class is MISSING:
                raise AttributeError(self._name)
            return self.of_class
        value = vars(module).get(self._name, self.of_class)
        if value is MISSING:
            if not _is_an_empty_place(module, self._name):
                raise AttributeError(self._name)  # Python then asks the module
            value = None
        return self._reads.seen(module, (self._name,), value, sys._getframe(1))

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)[self._name] = value

    def __delete__(self, module: nn.Module) -> None:
        if self._name not in vars(module):
            raise AttributeError(self._name)
        del vars(module)[self._name]


def _is_an_empty_place(module: nn.Module, name: str) -> bool:
    """Whether None is held in the place of a parameter, buffer or module."""
    places: tuple[Any, ...] = (module._parameters, module._buffers, module._modules)
    return any(name in held and held[name] is None for held in places)


class _Reads:
    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._on_classes: list[tuple[type, str, Any, Any]] = []
        self._lookups: dict[type, tuple[bool, Any]] = {}
        self._holders: dict[int, tuple[Any, nn.Module, tuple[str, ...]]] = {}

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Put an entry on the classes of some modules for each attribute that these hold."""
        names: dict[type, set[str]] = {}
        for module in modules:
            if isinstance(module, (torch.jit.ScriptModule, GraphModule)) or _is_ours(type(module)):
                continue
            found = names.setdefault(type(module), set())
            found |= vars(module).keys() - _TORCHS_OWN
            for held in (module._parameters, module._buffers, module._modules):
                found |= {name for name, value in held.items() if value is None}
        for kind, found in names.items():
            for name in found | _names_of_class(kind):
                of_class = _plain_on_class(kind, name)
                if of_class is _OTHER or name.startswith("__"):
                    continue
                self._put(kind, name, Observed(name, of_class, self))
            self._put(kind, "__getattr__", self._noticing_absence(kind))

    def _put(self, kind: type, name: str, entry: Any) -> None:
        before = vars(kind).get(name, MISSING)
        try:
            setattr(kind, name, entry)
        except (TypeError, AttributeError):
            return  # a class that does not let itself be changed
        self._on_classes.append((kind, name, before, entry))

    def _noticing_absence(self, kind: Any) -> Callable[[nn.Module, str], Any]:
        """Return what a class does for an attribute that Python does not find, which is noted."""
        own = vars(kind).get("__getattr__")

        def found(module: Any, name: str) -> Any:
            parent: Any = super(kind, module)
            try:
                return own(module, name) if own is not None else parent.__getattr__(name)
            except AttributeError:
                frame = sys._getframe(1)
                if not name.startswith("__") and not frame.f_code.co_filename.startswith(TORCH_FOLDER):
                    self.seen(module, (name,), MISSING, frame)
                raise

        return found

    def put_back(self) -> None:
        """Let classes be as they were, but for what was given to them meanwhile."""
        for kind, name, before, entry in reversed(self._on_classes):
            if vars(kind).get(name) is not entry:
                continue
            if before is MISSING:
                delattr(kind, name)
            else:
                setattr(kind, name, before)
        for kind, (was_its_own, lookup) in self._lookups.items():
            if was_its_own:
                setattr(kind, _LOOKUP, lookup)
            else:
                delattr(kind, _LOOKUP)
        self._holders.clear()

    def seen(self, owner: nn.Module, names: tuple[str, ...], value: Any, frame: FrameType) -> Any:
        """Note a read; return what to go on with."""
        is_ours = value is not MISSING and _is_ours(type(value))
        if isinstance(value, (Tensor, nn.Module)) or is_tracked_value(value) or is_ours:
            return value
        if not self._follower.is_following or _is_machinery(frame):
            return value
        if is_followed(value) and self._is_looked_into(type(value)):
            self._holders[id(value)] = value, owner, names
        return self._follower.attribute_read(owner, names, value, Place(frame))

    def _is_looked_into(self, kind: type) -> bool:
        """Let a class of objects say what is read from them; False where it cannot be changed."""
        if kind in self._lookups:
            return True
        lookup: Callable[[Any, str], Any] = getattr(kind, _LOOKUP)

        def noticed(held: Any, name: str) -> Any:
            known = self._holders.get(id(held))
            if known is None or known[0] is not held or name.startswith("__"):
                return lookup(held, name)
            try:
                value = lookup(held, name)
            except AttributeError:
                self.seen(known[1], (*known[2], name), MISSING, sys._getframe(1))
                raise
            if callable(value) and name not in fields_of(held):
                return value  # a method
            return self.seen(known[1], (*known[2], name), value, sys._getframe(1))

        before = vars(kind).get(_LOOKUP)
        try:
            setattr(kind, _LOOKUP, noticed)
        except (TypeError, AttributeError):
            return False
        self._lookups[kind] = before is not None, before
        return True


TORCH_FOLDER = torch.__path__[0]
_LOOKUP = "__getattribute__"
_OTHER = object()
_TORCHS_OWN = frozenset(vars(nn.Module())) | {"forward", "training"}


def _plain_on_class(kind: type, name: str) -> Any:
    """Return the value that a class gives an attribute; MISSING if none, ``_OTHER`` if it is no value."""
    for base in kind.__mro__:
        if name in vars(base):
            found = vars(base)[name]
            found = found.of_class if isinstance(found, Observed) else found
            is_value = found is not MISSING and not _has_getter(type(found))
            return found if is_value or found is MISSING else _OTHER
    return MISSING


def _has_getter(kind: type) -> bool:
    return any("__get__" in vars(base) for base in type.__dict__["__mro__"].__get__(kind))


def _names_of_class(kind: type) -> set[str]:
    """Return the names of what a class of somebody's gives its instances, and what is no method."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    return {name for base in bases for name in vars(base) if not name.startswith("__")}


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("biofx.") and not kind.__module__.startswith("biofx.demo")


def _is_machinery(frame: FrameType) -> bool:
    """Whether it is the capture that reads, and not a forward."""
    name = str(frame.f_globals.get("__name__"))
    return name.startswith(_MACHINERY) or name == "copy"


_MACHINERY = (
    "biofx.capture.",
    "biofx.capture",
    "biofx.graph.",
    "biofx.layers.",
    "biofx.model.",
    "torch.fx.",
)
