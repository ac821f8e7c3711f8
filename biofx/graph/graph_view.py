"""A graph as plain values, for pictures and pages that are made after the graph has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.fx import GraphModule, Node

from biofx.graph.joined_graph import whole_graph
from biofx.graph.modules_by_path import modules_by_path
from biofx.graph.printing import format_node, function_name
from biofx.select import module_calls


@dataclass(frozen=True)
class NodeView:
    """One node at the time of the view."""

    name: str
    op: str
    """Its ``torch.fx`` operation, e.g. ``"call_module"``."""
    what: str
    """Its operation in a word: name of the function or method, class of the layer, name of the parameter."""
    line: str
    """The node as a line of text."""
    inputs: tuple[str, ...]
    """Names of the nodes whose values it takes, in order, each once."""
    calls: tuple[tuple[str, int], ...]
    """The calls of modules around it, outermost first: path of the module and index of the call, from 0."""


@dataclass(frozen=True)
class ModuleView:
    """One module of the tree, called in the graph or not."""

    classes: tuple[str, ...]
    """Names for ``type:`` selectors: those of its class and of every base, short and in full."""
    parameters: int
    """Elements of its own parameters, a count; a shared parameter counts at its first module only."""

    @property
    def kind(self) -> str:
        """Short name of its class."""
        return self.classes[0]


@dataclass(frozen=True)
class GraphView:
    """A graph and the modules around it."""

    nodes: tuple[NodeView, ...]
    """In graph order."""
    modules: Mapping[str, ModuleView]
    """By path, the model itself under the empty one."""

    @classmethod
    def of(cls, graph_module: GraphModule, lines: Mapping[str, str] | None = None) -> GraphView:
        """Return the view of a graph module; ``lines`` is the text of its nodes, if it is known already."""
        counted: set[int] = set()
        names: dict[type, tuple[str, ...]] = {}
        modules = {
            path: ModuleView(_class_names(type(module), names), _own_elements(module, counted))
            for path, module in modules_by_path(graph_module).items()
        }
        graph = whole_graph(graph_module)
        lines = {node.name: format_node(node) for node in graph.nodes} if lines is None else lines
        nodes = tuple(_node_view(node, lines[node.name], modules) for node in graph.nodes)
        return cls(nodes, modules)

    @cached_property
    def by_name(self) -> Mapping[str, NodeView]:
        """The nodes by name."""
        return {node.name: node for node in self.nodes}


def _node_view(node: Node, line: str, modules: Mapping[str, ModuleView]) -> NodeView:
    inputs = tuple(source.name for source in node.all_input_nodes)
    return NodeView(node.name, node.op, _what(node, modules), line, inputs, module_calls(node))


def _what(node: Node, modules: Mapping[str, ModuleView]) -> str:
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "call_module" and node.target in modules:
        return modules[str(node.target)].kind
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[2]
    return function_name(node.target)


def _class_names(cls: type, known: dict[type, tuple[str, ...]]) -> tuple[str, ...]:
    if cls not in known:
        both = ((c.__name__, f"{c.__module__}.{c.__qualname__}") for c in cls.__mro__)
        known[cls] = tuple(dict.fromkeys(name for names in both for name in names))
    return known[cls]


def _own_elements(module: nn.Module, counted: set[int]) -> int:
    total = 0
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in counted:
            counted.add(id(parameter))
            total += parameter.numel()
    return total
