"""What a forward reads from the attributes of modules, and of objects that modules hold.

Python looks an attribute up on the class before it looks into the instance if the class has a descriptor by
that name. So while a forward is captured, the classes of its modules have a descriptor for each attribute,
and the classes of objects that modules hold have a ``__getattribute__`` that notes reads. Each read ends in a
:class:`ReadLog`, and from there in the guards of the graph module (:mod:`biofx.model.attribute_guards`): a
number that only goes into arithmetic is read by the graph at each call, anything else must stay what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from biofx.capture.bytecode import CallSite, is_name_of_biofx
from biofx.capture.symbolic_scalars import Builder, Source, is_symbolic, symbolic
from biofx.model.attribute_guards import MISSING, Needed, fields_of, is_followed, put_guards
from biofx.model.modes import ModeSwitches
from biofx.static_inspection import bases_outside_torch


@dataclass(frozen=True)
class Read:
    """One attribute that a forward has read."""

    path: str
    """Of the module, in the module whose graph it is."""
    names: tuple[str, ...]
    line: str
    """File and line."""
    decides: bool
    """Whether what was read may have decided something, and not only gone into arithmetic."""

    @property
    def target(self) -> str:
        """The target of a node that reads it."""
        return ".".join((self.path, *self.names) if self.path else self.names)


class ReadLog:
    """The reads of one forward, in order."""

    def __init__(self, builder: Builder) -> None:
        self.reads: list[Read] = []
        self._builder = builder

    def take(self, path: str, names: tuple[str, ...], value: Any, site: CallSite) -> Any:
        """Note a read; return a symbolic number where the value is an operand, else the value."""
        is_number = type(value) is float or (type(value) is int and site.is_operand)
        flows = is_number and not site.formats_numbers and all(name.isidentifier() for name in names)
        read = Read(path, names, site.line, not flows)
        self.reads.append(read)
        if not flows:
            return value
        return symbolic(
            value,
            self._builder,
            lambda: self._builder.attribute_node(read.target),
            frozenset({(path, names)}),
        )

    def decided_by(self, sources: Iterable[Source]) -> None:
        """Note that numbers read earlier have decided something."""
        site = CallSite.in_model()
        line = "its forward" if site is None else site.line
        self.reads += [Read(path, names, line, True) for path, names in sorted(sources)]


def guard_reads(
    graph_module: nn.Module, graph: Graph, reads: Iterable[Read], switches: ModeSwitches, prefix: str = ""
) -> None:
    """Let a graph module check, at each call, the attributes that its graph takes for constant.

    Args:
        graph_module: what was made of the module.
        graph: its graph; what a node of it reads is free to change.
        reads: what the forward read while the graph was captured.
        switches: what train() and eval() change.
        prefix: path of the module in the whole model.
    """
    nodes = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    decides: dict[tuple[str, tuple[str, ...]], str] = {}
    flows: dict[tuple[str, tuple[str, ...]], str] = {}
    for read in reads:
        kind = decides if read.decides or read.target not in nodes else flows
        kind.setdefault((read.path, read.names), read.line)
    put_guards(
        graph_module,
        [
            Needed(path, names, line, is_read, switches.pair(prefix, path, names))
            for kind, is_read in ((decides, False), (flows, True))
            for (path, names), line in kind.items()
            if not (is_read and (path, names) in decides)
        ],
        prefix,
    )


class ReadTracer(Protocol):
    """A tracer that follows reads of attributes."""

    @property
    def is_following(self) -> bool:
        """Whether what happens now is part of a graph."""

    def attribute_read(self, owner: nn.Module, names: tuple[str, ...], value: Any, site: CallSite) -> Any:
        """Note a read; return what the forward gets."""


@contextmanager
def reads_noticed(modules: Iterable[nn.Module], tracer: ReadTracer) -> Iterator[None]:
    """Report every read of an attribute of the modules to a tracer meanwhile."""
    patches = _ReadPatches(tracer)
    try:
        patches.put_on(modules)
        yield
    finally:
        patches.remove()


class ObservedAttribute:
    """The descriptor that a class has for an attribute of its instances."""

    def __init__(self, name: str, of_class: Any, patches: _ReadPatches) -> None:
        self.of_class = of_class
        """What the class itself has under the name."""
        self._name = name
        self._patches = patches

    def __get__(self, module: nn.Module | None, kind: type | None = None) -> Any:
        if module is None:
            if self.of_class is MISSING:
                raise AttributeError(self._name)
            return self.of_class
        value = vars(module).get(self._name, self.of_class)
        if value is MISSING:
            if not _holds_none(module, self._name):
                raise AttributeError(self._name)  # Python then calls __getattr__
            value = None
        return self._patches.read(module, (self._name,), value, CallSite.of_caller())

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)[self._name] = value

    def __delete__(self, module: nn.Module) -> None:
        if self._name not in vars(module):
            raise AttributeError(self._name)
        del vars(module)[self._name]


_LOOKUP = "__getattribute__"
_OTHER = object()
_TORCHS_OWN = frozenset(vars(nn.Module())) | {"forward", "training"}


class _ReadPatches:
    def __init__(self, tracer: ReadTracer) -> None:
        self._tracer = tracer
        self._replaced: list[tuple[type, str, Any, Any]] = []
        self._lookups: dict[type, Any] = {}
        self._holders: dict[int, tuple[Any, nn.Module, tuple[str, ...]]] = {}

    def put_on(self, modules: Iterable[nn.Module]) -> None:
        """Put a descriptor on the classes of the modules for each attribute."""
        names: dict[type, set[str]] = {}
        for module in modules:
            kind = type(module)
            if isinstance(module, (torch.jit.ScriptModule, GraphModule)) or is_name_of_biofx(kind.__module__):
                continue
            found = names.setdefault(kind, set())
            found |= vars(module).keys() - _TORCHS_OWN
            for held in (module._parameters, module._buffers, module._modules):
                found |= {name for name, value in held.items() if value is None}
        for kind, found in names.items():
            found |= {name for base in bases_outside_torch(kind) for name in vars(base)}
            for name in found:
                of_class = _plain_on_class(kind, name)
                if of_class is not _OTHER and not name.startswith("__"):
                    self._put(kind, name, ObservedAttribute(name, of_class, self))
            self._put(kind, "__getattr__", self._noting_absence(kind))

    def _put(self, kind: type, name: str, entry: Any) -> bool:
        before = vars(kind).get(name, MISSING)
        try:
            setattr(kind, name, entry)
        except (TypeError, AttributeError):
            return False  # a class that does not let itself be changed
        self._replaced.append((kind, name, before, entry))
        return True

    def remove(self) -> None:
        """Restore the classes, but for what was assigned to them meanwhile."""
        for kind, name, before, entry in reversed(self._replaced):
            if vars(kind).get(name) is not entry:
                continue
            if before is MISSING:
                delattr(kind, name)
            else:
                setattr(kind, name, before)
        self._holders.clear()

    def _noting_absence(self, kind: Any) -> Callable[[nn.Module, str], Any]:
        """Return a ``__getattr__`` for a class that notes attributes that are not there."""
        own = vars(kind).get("__getattr__")

        def found(module: Any, name: str) -> Any:
            parent: Any = super(kind, module)
            try:
                return own(module, name) if own is not None else parent.__getattr__(name)
            except AttributeError:
                site = CallSite.of_caller()
                if not name.startswith("__") and not site.is_of_torch:
                    self.read(module, (name,), MISSING, site)
                raise

        return found

    def read(self, owner: nn.Module, names: tuple[str, ...], value: Any, site: CallSite) -> Any:
        """Note a read; return what the forward gets."""
        if isinstance(value, (Tensor, nn.Module)) or is_symbolic(value):
            return value
        if value is not MISSING and is_name_of_biofx(type(value).__module__):
            return value
        if not self._tracer.is_following or site.is_of_capture:
            return value
        if is_followed(value) and self._follows(type(value)):
            self._holders[id(value)] = value, owner, names
        return self._tracer.attribute_read(owner, names, value, site)

    def _follows(self, kind: type) -> bool:
        """Let objects of a class report reads of their attributes; False where it cannot be changed."""
        if kind in self._lookups:
            return True
        lookup: Callable[[Any, str], Any] = getattr(kind, _LOOKUP)

        def noticed(held: Any, name: str) -> Any:
            known = self._holders.get(id(held))
            if known is None or known[0] is not held or name.startswith("__"):
                return lookup(held, name)
            _, owner, names = known
            try:
                value = lookup(held, name)
            except AttributeError:
                self.read(owner, (*names, name), MISSING, CallSite.of_caller())
                raise
            if callable(value) and name not in fields_of(held):
                return value  # a method
            return self.read(owner, (*names, name), value, CallSite.of_caller())

        if not self._put(kind, _LOOKUP, noticed):
            return False
        self._lookups[kind] = noticed
        return True


def _holds_none(module: nn.Module, name: str) -> bool:
    """Whether None is held in the place of a parameter, buffer or module."""
    places: tuple[Any, ...] = (module._parameters, module._buffers, module._modules)
    return any(name in held and held[name] is None for held in places)


def _plain_on_class(kind: type, name: str) -> Any:
    """Return the value that a class gives an attribute; MISSING if none, ``_OTHER`` if it is a descriptor."""
    for base in kind.__mro__:
        if name in vars(base):
            found = vars(base)[name]
            found = found.of_class if isinstance(found, ObservedAttribute) else found
            is_value = found is MISSING or not _has_getter(type(found))
            return found if is_value else _OTHER
    return MISSING


def _has_getter(kind: type) -> bool:
    return any("__get__" in vars(base) for base in type.__dict__["__mro__"].__get__(kind))
