"""One graph while it is recorded: which node stands for which tensor, and what a node can hold."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer

from biofx.capturing.switches import Switches
from biofx.capturing.tracked import is_tracked, plain, tracked
from biofx.graph.assignments import OWN_MODULE, assign_buffer
from biofx.graph.guards import require_default, require_same

if TYPE_CHECKING:
    from biofx.capturing.forward_recorder import Recorder

BY_VALUE = "sized_by_values"
"""The mark of a node whose size depends on the values of a tensor."""


class Keep(BaseException):
    """Recording stops here: a module must keep its own forward. No ``except Exception`` is to swallow it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


class Frame:
    """One graph that is being recorded, for one module."""

    def __init__(self, recorder: Recorder, path: str, module: nn.Module) -> None:
        self.path = path
        self.graph = Graph(tracer_cls=Tracer)
        self.stack: list[tuple[str, str, type]] = []
        self._recorder = recorder
        self._local = {id(inner): name for name, inner in module.named_modules()}
        self._calls: dict[str, int] = {}
        self._nodes: dict[int, tuple[Node, Tensor]] = {}
        self._stored: dict[int, str] = {}
        self._parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        for name, inner in module.named_modules():
            held = (*inner._parameters.items(), *inner._buffers.items(), *vars(inner).items())
            for key, value in held:
                if isinstance(value, Tensor):
                    self._stored.setdefault(id(value), f"{name}.{key}" if name else key)
        self._reads: dict[str, Node] = {}
        self._expected: set[Any] = set()
        self._handed_in: list[tuple[str, Any, Any]] = []
        self.switches = Switches(self)

    @property
    def is_current(self) -> bool:
        """Whether what happens now belongs into this graph."""
        return self._recorder.frame is self and not self._recorder.busy

    @property
    def innermost(self) -> str:
        """Path, in the whole model, of the module that is running."""
        inner = self.stack[-1][1] if self.stack else ""
        return joined_path(self.path, inner)

    def stop(self, what: str) -> NoReturn:
        """Let the module that is running keep its own forward."""
        self._recorder.stop(what)

    def write(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write a call of a function down."""
        return self.node("call_function", function, args)

    def enter(self, module: nn.Module) -> str:
        """Begin a call of a module inside this one; returns its path here."""
        if id(module) not in self._local:
            self.stop(f"calls a {type(module).__name__} that is not a submodule of it")
        path: str = self._local[id(module)]
        number = self._calls[path] = self._calls.get(path, -1) + 1
        self.stack.append((f"{path}@{number}" if number else path, path, type(module)))
        return path

    def node(self, op: str, target: Any, args: Any = (), kwargs: Any = None, name: str | None = None) -> Node:
        """Write a node down."""
        made = self.graph.create_node(op, target, args, kwargs or {}, name)
        made.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in self.stack}
        if any(source.meta.get(BY_VALUE) for source in made.all_input_nodes):
            made.meta[BY_VALUE] = True
        return made

    def auxiliary(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write down a node that may go if nothing uses it."""
        made = self.node("call_function", function, args)
        made.meta["auxiliary"] = True
        return made

    def expect(self, function: Callable[..., Any], operands: tuple[Any, ...], found: Any) -> None:
        """Let the graph check that a question about sizes has the answer that it has now."""
        arguments = tuple(self.argument(operand) for operand in operands)
        if any(isinstance(operand, Node) and operand.meta.get(BY_VALUE) for operand in arguments):
            self.stop("decides by a size that depends on the values of a tensor")
        key = (function, arguments)
        if key not in self._expected:
            self._expected.add(key)
            asked = self.node("call_function", function, arguments)
            words = f"{getattr(function, '__name__', function)}{arguments}"
            self.node("call_function", require_same, (asked, found, words, self.innermost))

    def argument(self, value: Any) -> Any:
        """Return a value in the form that a node can hold."""
        if isinstance(value, Node):
            return value
        if isinstance(value, Tensor):
            return self.node_of(value)
        if is_tracked(value, self):
            return value.node
        if isinstance(value, (bool, int, float, complex, str, type(None), type(...))):
            return plain(value)
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return value
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
            known = id(value) in self._nodes or (guard and id(value) in self._stored)
            if known and not in_place:
                # two names for one tensor now (an argument given twice, a dropout that drops nothing), and
                # maybe for two of them another time
                with self._recorder.quiet():
                    value = value.view_as(value)
            if id(value) not in self._stored:
                self._nodes.setdefault(id(value), (node, value))
            return value
        if type(value) in (int, float) or is_tracked(value, self):
            return tracked(plain(value), self, lambda: node)
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
        if guard and isinstance(value, (bool, str, type(None), torch.dtype)):
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
