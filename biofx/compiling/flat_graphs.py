"""A rewritten graph becomes one of functions again, of the inputs that dynamo's graph had and of state.

What compilers take are functions of tensors. Layers that no pass touched are the function calls that they
were; parameters are inputs where dynamo handed them over; rates, signs, masks and what else the rewritten
graph reads are further inputs, which are looked up at each call, so that what a rule changes acts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from biofx.compiling.dynamo_contexts import plain_context
from biofx.compiling.named_graphs import FunctionCall, NamedGraph
from biofx.errors import CaptureError


@dataclass(frozen=True)
class FlatGraph:
    """A graph of functions, and what to call it with."""

    module: GraphModule
    state: tuple[str, ...]
    """Paths of the tensors that it takes behind the inputs of dynamo's graph."""


def modes_read(graph: Graph) -> tuple[str, ...]:
    """Return the paths of the modules whose mode a rewritten graph reads."""
    found = (str(node.target) for node in graph.find_nodes(op="get_attr"))
    return tuple(dict.fromkeys(_owner(path) for path in found if path.rpartition(".")[2] == "training"))


def flat_graph(named: NamedGraph, find: Callable[[str], Any], modes: Mapping[str, bool]) -> FlatGraph:
    """Return a rewritten graph as a function of tensors.

    Args:
        named: a graph that was rewritten in place.
        find: returns what is at a path of the model or of its state.
        modes: of the modules at :func:`modes_read`.

    Raises:
        CaptureError: it calls a layer that was no function in dynamo's graph.
    """
    return _Flattening(named, find, modes).result()


class _Flattening:
    def __init__(self, named: NamedGraph, find: Callable[[str], Any], modes: Mapping[str, bool]) -> None:
        self.named, self.find, self.modes = named, find, modes
        self.graph, self.holder = Graph(), nn.Module()
        self.made: dict[Node, Any] = {}
        self.by_path: dict[str, Node] = {}
        self.by_tensor: dict[int, Node] = {}
        self.state: list[str] = []

    def result(self) -> FlatGraph:
        given = {}
        for name, path in self.named.inputs.items():
            given[name] = self.graph.placeholder(name)
            if path is not None:
                self.by_path[path] = given[name]
                self.by_tensor[id(self.find(path))] = given[name]
        anchor = self.graph.call_function(operator.getitem, ((None,), 0))  # where computation begins
        for node in self.named.module.graph.nodes:
            if node.op == "placeholder":
                self.made[node] = given[node.name]
            elif node.op == "get_attr":
                self.made[node] = self._read(str(node.target), anchor)
            elif node.op == "call_module":
                self.made[node] = self._function(node, self.named.functions.get(node.name), anchor)
            elif node.op == "call_function" and node.target is getattr and self._is_setting(node):
                self.made[node] = getattr(self.made[node.args[0]], str(node.args[1]))
            elif node.op == "output":
                self.graph.output(map_arg(node.args[0], self._mapped))
            else:
                self.made[node] = self._copy(node)
        self.graph.erase_node(anchor)
        self.graph.lint()
        return FlatGraph(GraphModule(self.holder, self.graph), tuple(self.state))

    def _mapped(self, node: Node) -> Any:
        return self.made[node]

    def _copy(self, node: Node) -> Node:
        target, given = plain_context(node) or (node.target, node.args)
        args, kwargs = map_arg(given, self._mapped), map_arg(node.kwargs, self._mapped)
        made = self.graph.create_node(node.op, target, args, kwargs, node.name)
        made.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        return made

    def _is_setting(self, node: Node) -> bool:
        return isinstance(node.args[0], Node) and isinstance(self.made[node.args[0]], nn.Module)

    def _read(self, path: str, anchor: Node) -> Any:
        """Return what a graph reads from a path: an input, or a value that holds as long as this graph."""
        owner, _, name = path.rpartition(".")
        if name == "training" and owner in self.modes:
            return self.modes[owner]
        if path in self.by_path:
            return self.by_path[path]
        if (own := vars(self.named.module).get("_modules", {}).get(path)) is not None and isinstance(
            own, GraphModule
        ):
            self.holder.add_module(path, own)
            return self.graph.get_attr(path)
        value = self.find(path)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.by_tensor:
            with self.graph.inserting_before(anchor):
                node = self.graph.placeholder(f"state_{path.replace('.', '_')}")
                node.target = node.name  # which is a name in Python, whatever modules are called
            self.by_tensor[id(value)] = node
            self.state.append(path)
        self.by_path[path] = self.by_tensor[id(value)]
        return self.by_path[path]

    def _function(self, node: Node, call: FunctionCall | None, anchor: Node) -> Node:
        """Return the call of the function that a layer's call was."""
        if call is None:
            module = self.named.module.get_submodule(str(node.target))
            if isinstance(module, GraphModule):
                self.holder.add_module(str(node.target), module)
                return self._copy(node)
            raise CaptureError(
                f"{node.name!r} calls a {type(module).__name__}, which is no function in the compiled graph; "
                "transform the model first and compile the result: torch.compile(bio_model)"
            )
        now: dict[Node, Any] = {}
        _pair(call.given, node.args, now)
        if call.counted:
            self.graph.call_method("add_", (self._read(call.counted, anchor), 1))

        def argument(entry: Node) -> Any:
            if entry in now:
                return self.made[now[entry]] if isinstance(now[entry], Node) else now[entry]
            if entry.op == "get_attr":  # no longer part of the graph, if only the layer read it
                return self._read(str(entry.target), anchor)
            return self.made[entry]

        args, kwargs = map_arg(call.args, argument), map_arg(dict(call.kwargs), argument)
        made = self.graph.create_node("call_function", call.target, args, kwargs, node.name)
        made.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        return made


def _pair(before: Any, after: Any, found: dict[Node, Any]) -> None:
    """Find out what stands now where each node stood."""
    if isinstance(before, Node):
        found[before] = after
    elif isinstance(before, (tuple, list)):
        for one, other in zip(before, after, strict=True):
            _pair(one, other, found)


def _owner(path: str) -> str:
    return path.rpartition(".")[0]
