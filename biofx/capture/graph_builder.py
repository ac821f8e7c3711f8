"""A graph under construction in an eager trace: which node gives which tensor, and what nodes can hold."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer

from biofx.capture.attribute_reads import ReadLog
from biofx.capture.bytecode import CallSite
from biofx.capture.context_tracking import OpenContexts
from biofx.capture.graph_breaks import READS_OUTSIDE, SWITCHED, GraphBreak
from biofx.capture.symbolic_scalars import is_symbolic, plain, plain_number, sources_in, symbolic
from biofx.graph.graph_functions import OWN_MODULE, assign_buffer
from biofx.graph.guards import require_same
from biofx.graph.node_kinds import IS_NUMBER
from biofx.graph.regions import joined_path
from biofx.static_inspection import is_of
from biofx.torch_private import forget_erased_names, is_erased, rename

if TYPE_CHECKING:
    from biofx.capture.eager_tracer import EagerTracer

DATA_DEPENDENT = "data_dependent_shape"
"""The mark of a node whose shape depends on the values of a tensor."""
_HELD_BY_NODES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclasses.dataclass(frozen=True)
class _Mark:
    """How far a graph was before a module was called."""

    last: Node | None
    calls: int
    contexts: int
    reads: int


class GraphBuilder:
    """The graph of one module, built while the module's forward runs."""

    def __init__(self, tracer: EagerTracer, path: str, module: nn.Module) -> None:
        self.path = path
        self.graph = Graph(tracer_cls=Tracer)
        self.broken_at: str | None = None
        """Path, in the whole model, of the module at which the graph breaks, and which still runs."""
        self.contexts = OpenContexts(self)
        self.log = ReadLog(self)
        self._tracer = tracer
        self._stack: list[tuple[str, str, type]] = []
        self._running: list[str] = []
        self._local: dict[int, str] = {id(inner): name for name, inner in module.named_modules()}
        self._calls: dict[str, int] = {}
        self._entered: list[str] = []
        self._nodes: dict[int, tuple[Node, Tensor]] = {}
        self._stored: dict[int, str] = {}
        self._parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        for name, inner in module.named_modules():
            held = (*inner._parameters.items(), *inner._buffers.items(), *vars(inner).items())
            for key, value in held:
                if is_of(value, Tensor):
                    self._stored.setdefault(id(value), joined_path(name, key))
        self._shared: dict[Any, Node] = {}
        """Nodes that are added once: reads of attributes, descriptions of tensors, checks."""
        self._devices: dict[int, tuple[Callable[[], Node], torch.device]] = {}

    @property
    def is_current(self) -> bool:
        """Whether what happens now belongs to this graph."""
        return self._tracer.tracing() is self

    @property
    def innermost(self) -> str:
        """Path, in the whole model, of the module that is running."""
        return self._running[-1] if self._running else self.path

    def stop(self, what: str) -> NoReturn:
        """Break the graph at the module that is running."""
        self._tracer.stop(what)

    # nodes

    def node(self, op: str, target: Any, args: Any = (), kwargs: Any = None, name: str | None = None) -> Node:
        """Add a node."""
        made = self.graph.create_node(op, target, args, kwargs or {}, name)
        if made.name == "self":  # a submodule of that name; the code of the graph means the module by it
            rename(made, "self_")
        made.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in self._stack}
        if any(source.meta.get(DATA_DEPENDENT) for source in made.all_input_nodes):
            made.meta[DATA_DEPENDENT] = True
        return made

    def auxiliary(
        self, function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: Any = None
    ) -> Node:
        """Add a call of a function, or of a method by its name, that is removed if nothing uses it."""
        op = "call_method" if isinstance(function, str) else "call_function"
        made = self.node(op, function, args, kwargs)
        made.meta["auxiliary"] = True
        return made

    def write(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Add a call of a function."""
        return self.node("call_function", function, tuple(map(self.argument, args)))

    def attribute_node(self, target: str) -> Node:
        """Return the node that reads a number of a module."""
        made = self._read(target)
        made.meta |= {"auxiliary": True, IS_NUMBER: True}
        return made

    def assign(self, owner: nn.Module, path: str, name: str, value: Tensor) -> bool:
        """Add the assignment to a buffer; False where that cannot be part of the graph.

        Args:
            owner: the module, before the assignment.
            path: of it in the whole model.
            name: of the buffer.
            value: what it will hold.
        """
        before = owner._buffers[name]
        alike = before is not None and (before.shape, before.dtype) == (value.shape, value.dtype)
        if before is None or not alike or id(owner) not in self._local:
            return False
        self.node_of(before).meta["auxiliary"] = True  # read here at the latest, ahead of the assignment
        source = self.node("get_attr", self._local[id(owner)] or OWN_MODULE)
        self.node("call_function", assign_buffer, (source, name, self.node_of(value), path))
        return True

    # modules

    def local_path(self, module: nn.Module) -> str:
        """Return the path of a module in the one whose graph this is."""
        if id(module) not in self._local:
            self.stop(f"calls a {type(module).__name__} that is not a submodule of it")
        return self._local[id(module)]

    @contextmanager
    def inside(self, module: nn.Module, path: str) -> Iterator[None]:
        """Mark the nodes that are added meanwhile as part of a call of a module, by its path in the model."""
        local = self._local[id(module)]
        number = self._calls[local] = self._calls.get(local, -1) + 1
        self._entered.append(local)
        self._stack.append((f"{local}@{number}" if number else local, local, type(module)))
        self._running.append(path)
        try:
            yield
        finally:
            self._stack.pop()
            self._running.pop()

    def mark(self) -> _Mark:
        """Return how far the graph is, to go back to."""
        last = next(iter(reversed(self.graph.nodes)), None)
        return _Mark(last, len(self._entered), self.contexts.depth, len(self.log.reads))

    def go_back(self, mark: _Mark) -> None:
        """Remove what was added since a mark."""
        for node in reversed(self.graph.nodes):
            if node is mark.last:
                break
            self.graph.erase_node(node)
        forget_erased_names(self.graph)  # else what comes would be numbered as in no other run
        self._nodes = {key: known for key, known in self._nodes.items() if not is_erased(known[0])}
        self._shared = {key: node for key, node in self._shared.items() if not is_erased(node)}
        for path in self._entered[mark.calls :]:
            self._calls[path] -= 1
        del self._entered[mark.calls :]
        self.contexts.go_back(mark.contexts)
        del self.log.reads[mark.reads :]
        self.broken_at = None

    # checks

    def attribute_read(self, owner: nn.Module, names: tuple[str, ...], value: Any, site: CallSite) -> Any:
        """Note that the forward reads an attribute; return what it gets."""
        if self._tracer.was_made(owner):
            return value
        path, local = self._tracer.path_of(owner), self._local.get(id(owner))
        if path is None or local is None:
            self.stop(READS_OUTSIDE.format(".".join(names)))
        if (path, names[0]) in self._tracer.mode_switches.unclear:
            self.stop(SWITCHED.format(names[0]))
        if type(value) is not float and not (type(value) is int and site.is_operand):
            self._ask_by_mode(path, names)
        return self.log.take(local, names, value, site)

    def _ask_by_mode(self, path: str, names: tuple[str, ...]) -> None:
        """Note that the mode decides, where it decides what an attribute is."""
        if (path, names[0]) in self._tracer.mode_switches.values:
            self._tracer.asks.add((self.innermost, path))

    def flag_read(self, module: nn.Module) -> None:
        """Note that the forward reads a flag that no train() of the model changes."""
        flag = vars(module)["training"]
        self.log.take(self._local[id(module)], ("training",), flag, CallSite.outside())

    def expect(self, function: Callable[..., Any] | str, operands: tuple[Any, ...], found: Any) -> None:
        """Let the graph check that a function, or a method by its name, returns what it has returned now."""
        sources = sources_in(operands)
        for path, names in sources:
            self._ask_by_mode(joined_path(self.path, path), names)
        self.log.decided_by(sources)
        if sources and all(sources_in((o,)) for o in operands if is_symbolic(o, self)):
            return  # of attributes alone, which are checked ahead of the graph
        try:
            self._expect(function, operands, found)
        except GraphBreak as found_break:
            self._tracer.give_up(found_break)

    def _expect(self, function: Callable[..., Any] | str, operands: tuple[Any, ...], found: Any) -> None:
        arguments = tuple(map(self.argument, operands))
        if any(isinstance(operand, Node) and operand.meta.get(DATA_DEPENDENT) for operand in arguments):
            self.stop("decides by a size that depends on the values of a tensor")

        def make() -> Node:
            kind = "call_method" if isinstance(function, str) else "call_function"
            query = self.node(kind, function, arguments)
            words = f"{getattr(function, '__name__', function)}{arguments}"
            return self.node("call_function", require_same, (query, found, words, self.innermost))

        self._once((function, arguments), make)

    # values

    def argument(self, value: Any) -> Any:
        """Return a value in the form that a node can hold."""
        if isinstance(value, Node):
            return value
        if isinstance(value, Tensor):
            return self.node_of(value)
        if is_symbolic(value, self):
            return value.node
        if isinstance(value, (bool, int, float, complex, str, type(None), type(...))):
            return plain_number(plain(value))
        if isinstance(value, torch.device) and id(value) in self._devices:
            return self._devices[id(value)][0]()
        if isinstance(value, _HELD_BY_NODES):
            return plain(value)
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        if type(value) in (tuple, torch.Size):
            return tuple(map(self.argument, value))
        if type(value) is list:
            return list(map(self.argument, value))
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: self.argument(entry) for key, entry in value.items()}
        return self.stop(f"passes on a {type(value).__name__}, which a graph cannot hold")

    def node_of(self, tensor: Tensor) -> Node:
        """Return the node that gives a tensor."""
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)][0]
        if id(tensor) not in self._stored:
            self.stop(
                "uses a tensor that is no input, held by no module of it, and made by no torch function in it"
            )
        return self._read(self._stored[id(tensor)])

    def take(self, node: Node, value: Any, *, in_place: bool = False) -> Any:
        """Let a node give a value; return the value, with symbolic numbers in it, for the forward to use."""
        if isinstance(value, Tensor):
            if self.knows(value) and not in_place:
                # two names for one tensor now (an argument given twice, a dropout that drops nothing, a cast
                # to the type that it has), and maybe for two of them another time
                with self._tracer.quiet():
                    value = value.view_as(value)
            if id(value) not in self._stored:
                self._nodes.setdefault(id(value), (node, value))
            return value
        value = plain(value)
        if type(value) in (int, float, torch.dtype, torch.device):
            return self.remembered(value, lambda: node)
        return with_entries(
            value, lambda access, entry: self.take(self.auxiliary(access[0], (node, access[1])), entry)
        )

    def remembered(self, value: Any, make: Callable[[], Node]) -> Any:
        """Return a number, type or device that remembers a node, which is made when it is used."""
        if isinstance(value, torch.device):
            # its class cannot be derived from, but each query is answered with an object of its own
            value = torch.device(value)
            self._devices[id(value)] = make, value
            return value
        return symbolic(value, self, make)

    def description(self, tensor: Tensor, attribute: str, found: Any) -> Any:
        """Return the type or device of a tensor, which the graph reads again where it is used.

        That of a tensor which is not known here is a constant, as the tensor is.
        """
        if not self.knows(tensor):
            return found

        def make() -> Node:
            key = self.node_of(tensor), attribute
            return self._once(key, lambda: self.auxiliary(getattr, key))

        return self.remembered(found, make)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor comes in, was made here or is held by the module."""
        return id(tensor) in self._nodes or id(tensor) in self._stored

    def is_stored(self, tensor: Tensor) -> bool:
        """Whether a tensor is held by the module, so that its shape does not change."""
        return id(tensor) in self._stored and id(tensor) not in self._nodes

    def is_parameter(self, node: Node) -> bool:
        """Whether a node reads a parameter."""
        return node.op == "get_attr" and node.target in self._parameters

    def _read(self, target: str) -> Node:
        return self._once(target, lambda: self.node("get_attr", target))

    def _once(self, key: Any, make: Callable[[], Node]) -> Node:
        """Return the node that is added once for a key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


Access = tuple[Callable[..., Any], Any]
"""A function (``getitem`` or ``getattr``) and a key: how an entry of a container is read."""


def with_entries(value: Any, of_entry: Callable[[Access, Any], Any]) -> Any:
    """Return a container with other entries if it is a plain tuple, list or dict; any other value as it is.

    No walk of ``torch.utils._pytree``: dataclasses and classes derived from dict need not be registered
    there, and the accesses become nodes, which are numbered in this order.
    """
    if isinstance(value, dict):
        entries = {key: of_entry((operator.getitem, key), entry) for key, entry in value.items()}
        return entries if type(value) is dict else value
    if isinstance(value, (tuple, list)):
        kind = type(value)
        items = [of_entry((operator.getitem, place), entry) for place, entry in enumerate(value)]
        return kind(items) if kind in (tuple, list) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            of_entry((getattr, field.name), getattr(value, field.name))
    return value
