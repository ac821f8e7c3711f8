"""One graph while it is recorded: which node stands for which tensor, and what a node can hold."""

from __future__ import annotations

import copy
import dataclasses
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer

from biofx.capture.attribute_reads import Place
from biofx.capture.mode_switches import SWITCHED
from biofx.capture.read_log import ReadLog
from biofx.capture.switches import Switches
from biofx.capture.tracked import is_tracked, plain, plain_number, sources_in, tracked
from biofx.graph.graph_functions import OWN_MODULE, assign_buffer
from biofx.graph.guards import require_default, require_same
from biofx.graph.node_kinds import IS_NUMBER
from biofx.unasked import is_of

if TYPE_CHECKING:
    from biofx.capture.forward_recorder import Recorder

BY_VALUE = "sized_by_values"
"""The mark of a node whose size depends on the values of a tensor."""


class GraphBreak(BaseException):
    """Recording stops here: a module must keep its own forward. No ``except Exception`` is to swallow it.

    Args:
        path: of the module.
        reason: why.
        all_alike: whether the reason lies in the module's class.
    """

    def __init__(self, path: str, reason: str, *, all_alike: bool = False) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason
        self.all_alike = all_alike


@dataclasses.dataclass(frozen=True)
class _Mark:
    """How far a frame had come before a module was called."""

    last: Node | None
    calls: int
    contexts: int
    reads: int


class Frame:
    """One graph that is being recorded, for one module."""

    def __init__(self, recorder: Recorder, path: str, module: nn.Module) -> None:
        self.path = path
        self.graph = Graph(tracer_cls=Tracer)
        self.stack: list[tuple[str, str, type]] = []
        self.given_up: str | None = None
        """Path, in the whole model, of a module that goes on without being recorded."""
        self._running: list[str] = []
        self._recorder = recorder
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
                    self._stored.setdefault(id(value), f"{name}.{key}" if name else key)
        self._reads: dict[str, Node] = {}
        self._descriptions: dict[tuple[Node, str], Node] = {}
        self._devices: dict[int, tuple[Callable[[], Node], torch.device]] = {}
        self._expected: dict[Any, Node] = {}
        self._handed_in: list[tuple[str, Any, Any]] = []
        self.switches = Switches(self)
        self.log = ReadLog(self)

    @property
    def is_current(self) -> bool:
        """Whether what happens now belongs into this graph."""
        return self._recorder.following() is self

    @property
    def innermost(self) -> str:
        """Path, in the whole model, of the module that is running."""
        return self._running[-1] if self._running else self.path

    def stop(self, what: str) -> NoReturn:
        """Let the module that is running keep its own forward."""
        self._recorder.stop(what)

    def write(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write a call of a function down."""
        return self.node("call_function", function, tuple(map(self.argument, args)))

    def local_path(self, module: nn.Module) -> str:
        """Return the path, in the module that this graph is of, of one inside it."""
        if id(module) not in self._local:
            self.stop(f"calls a {type(module).__name__} that is not a submodule of it")
        return self._local[id(module)]

    @contextmanager
    def inside(self, module: nn.Module, path: str) -> Iterator[None]:
        """Note what is written meanwhile as part of a call of a module, by its path in the whole model."""
        local = self._local[id(module)]
        number = self._calls[local] = self._calls.get(local, -1) + 1
        self._entered.append(local)
        self.stack.append((f"{local}@{number}" if number else local, local, type(module)))
        self._running.append(path)
        try:
            yield
        finally:
            self.stack.pop()
            self._running.pop()

    def mark(self) -> _Mark:
        """Return how far this has come, to go back to."""
        last = next(iter(reversed(self.graph.nodes)), None)
        return _Mark(last, len(self._entered), self.switches.depth, len(self.log.reads))

    def go_back(self, mark: _Mark) -> None:
        """Forget what was written since a mark."""
        for node in reversed(self.graph.nodes):
            if node is mark.last:
                break
            self.graph.erase_node(node)
        names = type(self.graph._graph_namespace)()
        for node in self.graph.nodes:
            names.create_name(node.name, node)
        self.graph._graph_namespace = names  # else what comes would be numbered as in no other run
        self._nodes = {key: known for key, known in self._nodes.items() if not known[0]._erased}
        self._reads = {path: read for path, read in self._reads.items() if not read._erased}
        self._expected = {key: guard for key, guard in self._expected.items() if not guard._erased}
        self._descriptions = {key: node for key, node in self._descriptions.items() if not node._erased}
        for path in self._entered[mark.calls :]:
            self._calls[path] -= 1
        del self._entered[mark.calls :]
        self.switches.go_back(mark.contexts)
        self.log.forget(mark.reads)
        self.given_up = None

    def node(self, op: str, target: Any, args: Any = (), kwargs: Any = None, name: str | None = None) -> Node:
        """Write a node down."""
        made = self.graph.create_node(op, target, args, kwargs or {}, name)
        if made.name == "self":  # a submodule of that name; the code of the graph means the module by it
            made._rename("self_")
        made.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in self.stack}
        if any(source.meta.get(BY_VALUE) for source in made.all_input_nodes):
            made.meta[BY_VALUE] = True
        return made

    def auxiliary(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write down a node that may go if nothing uses it."""
        made = self.node("call_function", function, args)
        made.meta["auxiliary"] = True
        return made

    def attribute_read(self, owner: nn.Module, names: tuple[str, ...], value: Any, place: Place) -> Any:
        """Note that a forward reads an attribute; return what to go on with."""
        path, local = self._recorder.path_of(owner), self._local.get(id(owner))
        if path is None or local is None:
            self.stop(f"reads attribute {'.'.join(names)!r} of a module outside of it")
        if (path, names[0]) in self._recorder.mode_switches.unclear:
            self.stop(SWITCHED.format(names[0]))
        if type(value) is not float and not (type(value) is int and place.is_operand):
            self._ask_by_mode(path, names)
        return self.log.take(local, names, value, place)

    def _ask_by_mode(self, path: str, names: tuple[str, ...]) -> None:
        """Note that a mode decides, where an attribute is another one in the other."""
        if (path, names[0]) in self._recorder.mode_switches.values:
            self._recorder.asks.add((self.innermost, path))

    def note_flag(self, module: nn.Module) -> None:
        """Note that a forward reads a flag that no train() of the model changes."""
        flag = vars(module)["training"]
        self.log.take(self._local[id(module)], ("training",), flag, Place(sys._getframe(3)))

    def attribute_node(self, target: str) -> Node:
        """Return the node that reads a number of a module."""
        if target not in self._reads:
            self._reads[target] = self.node("get_attr", target)
            self._reads[target].meta |= {"auxiliary": True, IS_NUMBER: True}
        return self._reads[target]

    def expect(self, function: Callable[..., Any] | str, operands: tuple[Any, ...], found: Any) -> None:
        """Let the graph check that a question (a function, or a method's name) has its present answer."""
        sources = sources_in(operands)
        for path, names in sources:
            self._ask_by_mode(joined_path(self.path, path), names)
        self.log.decided_by(sources)
        if sources and all(sources_in((o,)) for o in operands if is_tracked(o, self)):
            return  # of attributes alone, which are looked at ahead of the graph
        try:
            self._expect(function, operands, found)
        except GraphBreak as keep:
            self._recorder.give_up(keep)

    def _expect(self, function: Callable[..., Any] | str, operands: tuple[Any, ...], found: Any) -> None:
        arguments = tuple(self.argument(operand) for operand in operands)
        if any(isinstance(operand, Node) and operand.meta.get(BY_VALUE) for operand in arguments):
            self.stop("decides by a size that depends on the values of a tensor")
        key = (function, arguments)
        if key not in self._expected:
            kind = "call_method" if isinstance(function, str) else "call_function"
            asked = self.node(kind, function, arguments)
            words = f"{getattr(function, '__name__', function)}{arguments}"
            guard = self.node("call_function", require_same, (asked, found, words, self.innermost))
            self._expected[key] = guard

    def argument(self, value: Any) -> Any:
        """Return a value in the form that a node can hold."""
        if isinstance(value, Node):
            return value
        if isinstance(value, Tensor):
            return self.node_of(value)
        if is_tracked(value, self):
            return value.node
        if isinstance(value, (bool, int, float, complex, str, type(None), type(...))):
            return plain_number(plain(value))
        if isinstance(value, torch.device) and id(value) in self._devices:
            return self._devices[id(value)][0]()
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return plain(value)
        if isinstance(value, slice):
            return slice(*(self.argument(bound) for bound in (value.start, value.stop, value.step)))
        if type(value) in (tuple, torch.Size):
            return tuple(self.argument(entry) for entry in value)
        if type(value) is list:
            return [self.argument(entry) for entry in value]
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: self.argument(entry) for key, entry in value.items()}
        return self.stop(f"hands a {type(value).__name__} on, which a graph cannot hold")

    def node_of(self, tensor: Tensor) -> Node:
        """Return the node that gives a tensor."""
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)][0]
        path = self._stored.get(id(tensor))
        if path is None:
            self.stop("uses a tensor that neither comes in nor is held by it nor is made by torch here")
        if path not in self._reads:
            self._reads[path] = self.node("get_attr", path)
        return self._reads[path]

    def assign(self, owner: nn.Module, path: str, name: str, value: Tensor) -> bool:
        """Write down that a module of this one assigns to a buffer; False where that cannot be part of it.

        Args:
            owner: the module, before it does.
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

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor comes in, was made here or is held by the module."""
        return id(tensor) in self._nodes or id(tensor) in self._stored

    def description(self, tensor: Tensor, attribute: str, found: Any) -> Any:
        """Return the type or device of a tensor such that it is read anew wherever it is handed on.

        That of a tensor which is not known here is a constant, as the tensor is.
        """
        if not self.knows(tensor):
            return found

        def make() -> Node:
            key = self.node_of(tensor), attribute
            if key not in self._descriptions:
                self._descriptions[key] = self.auxiliary(getattr, key)
            return self._descriptions[key]

        return self.remembered(found, make)

    def remembered(self, value: Any, make: Callable[[], Node]) -> Any:
        """Return a number, type or device for which a node stands, made when it is handed on."""
        if isinstance(value, torch.device):
            # nothing can be derived from its class, but every question is answered by an object of its own
            value = torch.device(value)
            self._devices[id(value)] = make, value
            return value
        return tracked(value, self, make)

    def is_stored(self, tensor: Tensor) -> bool:
        """Whether a tensor is held by the module, so that its shape is settled."""
        return id(tensor) in self._stored and id(tensor) not in self._nodes

    def is_parameter(self, node: Node) -> bool:
        """Whether a node reads a parameter."""
        return node.op == "get_attr" and node.target in self._parameters

    def size_of(self, tensor: Tensor, place: int) -> Node:
        """Write down a node for one size of a tensor."""
        made = self.node("call_method", "size", (self.node_of(tensor), place))
        made.meta["auxiliary"] = True
        return made

    def take(self, node: Node, value: Any, *, guard: str = "", in_place: bool = False) -> Any:
        """Let a node stand for what comes in or is returned; give back what to go on with.

        ``guard`` names an argument, whose kind the graph then checks where that is not plain.
        """
        if isinstance(value, Tensor):
            if self.knows(value) and not in_place:
                # two names for one tensor now (an argument given twice, a dropout that drops nothing, a cast
                # to the type that it has), and maybe for two of them another time
                with self._recorder.quiet():
                    value = value.view_as(value)
            if id(value) not in self._stored:
                self._nodes.setdefault(id(value), (node, value))
            return value
        value = plain(value)
        if type(value) in (int, float, torch.dtype, torch.device):
            return self.remembered(value, lambda: node)
        if isinstance(value, dict):
            taken = {
                key: self.take(
                    self.auxiliary(operator.getitem, (node, key)), entry, guard=guard and f"{guard}[{key!r}]"
                )
                for key, entry in value.items()
            }
            return self._handed(guard, taken) if type(value) is dict else value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                self.take(self.auxiliary(getattr, (node, field.name)), getattr(value, field.name))
            return value
        if isinstance(value, (tuple, list)):
            entries = [
                self.take(
                    self.auxiliary(operator.getitem, (node, place)),
                    entry,
                    guard=guard and f"{guard}[{place}]",
                )
                for place, entry in enumerate(value)
            ]
            if guard:
                length = self.node("call_function", len, (node,))
                self.node(
                    "call_function", require_same, (length, len(entries), f"len({guard})", self.innermost)
                )
            kind = type(value)
            return self._handed(guard, kind(entries)) if kind in (tuple, list) else value
        if guard and isinstance(value, (bool, str, type(None))):
            self.node("call_function", require_default, (node, value, guard))
        elif guard:
            self.stop(f"takes a {type(value).__name__} as {guard}, which a graph cannot look into")
        return value

    def _handed(self, guard: str, container: Any) -> Any:
        """Remember a container that stands for one of the caller's."""
        if guard:
            self._handed_in.append((guard, container, copy.copy(container)))
        return container

    def _check_arguments(self) -> None:
        """Stop where the forward has put something into a container of the caller's, or has taken it out."""
        for name, container, before in self._handed_in:
            entries, held = (list(c.values()) if isinstance(c, dict) else c for c in (container, before))
            alike = len(entries) == len(held) and all(map(operator.is_, entries, held))
            if not alike or (isinstance(container, dict) and list(container) != list(before)):
                self.stop(f"changes what it is given as {name}, which belongs to the caller")

    def output(self, value: Any) -> None:
        """End the graph, and drop what nothing uses."""
        self._check_arguments()
        self.switches.check_end()
        self.graph.output(self._returned(value))
        for node in reversed(self.graph.nodes):
            if node.meta.get("auxiliary") and not node.users:
                self.graph.erase_node(node)

    def _returned(self, value: Any) -> Any:
        kind: Any = type(value)
        if issubclass(kind, dict) and dataclasses.is_dataclass(kind):
            fields = {key: self._returned(entry) for key, entry in value.items()}
            return self.node("call_function", kind, (), fields)
        if kind is OrderedDict:
            entries = [(key, self._returned(entry)) for key, entry in value.items()]
            return self.node("call_function", OrderedDict, (entries,))
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return kind(*(self._returned(entry) for entry in value))
        if kind in (tuple, list):
            return kind(self._returned(entry) for entry in value)
        if kind is dict:
            return {key: self._returned(entry) for key, entry in value.items()}
        return self.argument(value)


def joined_path(outer: str, inner: str) -> str:
    """Return the path of something inside a module."""
    return ".".join(part for part in (outer, inner) if part)
