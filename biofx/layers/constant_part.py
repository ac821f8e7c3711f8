"""The part of a graph that computes with parameters and buffers alone, and what it computes.

Weights, signs and rates reach their layer as expressions in the graph. What such an expression is worth at
this moment can be told without an input, and without running the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from biofx.errors import InvariantError
from biofx.graph.joined_graph import whole_graph
from biofx.graph.node_kinds import changed_in_place, changes_in_place
from biofx.graph.printing import format_node, function_name

_MISSING = object()


class ConstantPart:
    """The nodes of a graph whose values follow from parameters and buffers, and those values.

    Calls of modules are none of them (a module may have hooks and a state of its own), nor is what draws
    random numbers, nor what the graph changes in place somewhere.

    Args:
        graph_module: its nodes are looked at now; its tensors whenever a value is asked for.
        graph: the graph to look at, if not that of the model and its regions.
    """

    def __init__(self, graph_module: GraphModule, graph: Graph | None = None) -> None:
        self._graph_module = graph_module
        self.graph = whole_graph(graph_module) if graph is None else graph
        changed = {base for node in self.graph.nodes for base in changed_in_place(node)}
        self._nodes: set[Node] = set()
        self._roots: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            if node not in changed and self._is_constant(node):
                self._nodes.add(node)
                if (parameter := self.parameter(node)) is not None:
                    self._roots.setdefault(id(parameter), []).append(node)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def parameter(self, node: Node) -> nn.Parameter | None:
        """Return the parameter that a node reads, None if it reads something else."""
        found = self._held(str(node.target)) if node.op == "get_attr" else None
        return found if isinstance(found, nn.Parameter) else None

    def roots(self, parameter: nn.Parameter) -> list[Node]:
        """Return the nodes that read a parameter."""
        return self._roots.get(id(parameter), [])

    def value(self, node: Node, given: Mapping[Node, Any] | None = None) -> Any:
        """Return what a node computes at this moment; no gradient flows to it.

        Args:
            node: one of the constant nodes.
            given: values of some nodes, instead of what they compute.

        Raises:
            InvariantError: it is not one of the constant nodes, or computing it fails.
        """
        values: dict[Node, Any] = dict(given or {})
        pending = [node]
        with torch.no_grad():
            while pending:
                current = pending[-1]
                missing = [source for source in current.all_input_nodes if source not in values]
                if current in values:
                    pending.pop()
                elif current not in self._nodes:
                    raise InvariantError(
                        f"expected {current.name!r} to follow from parameters and buffers alone, found "
                        f"{format_node(current)!r}, which needs the model's input or changes at every call"
                    )
                elif missing:
                    pending += missing
                else:
                    values[pending.pop()] = self._computed(current, values)
        return values[node]

    def _computed(self, node: Node, values: Mapping[Node, Any]) -> Any:
        if node.op == "get_attr":
            return self._held(str(node.target))
        args = map_arg(node.args, lambda source: values[source])
        kwargs = map_arg(node.kwargs, lambda source: values[source])
        try:
            if node.op == "call_method":
                receiver, *rest = args
                return getattr(receiver, str(node.target))(*rest, **kwargs)
            function: Any = node.target
            return function(*args, **kwargs)
        except Exception as error:
            raise InvariantError(f"computing {format_node(node)!r} fails: {error}") from error

    def _is_constant(self, node: Node) -> bool:
        if node.op == "get_attr":
            return self._held(str(node.target)) is not _MISSING
        return (
            node.op in ("call_function", "call_method")
            and all(source in self._nodes for source in node.all_input_nodes)
            and not (node.is_impure() or changes_in_place(node) or _is_random(node))
        )

    def _held(self, path: str) -> Any:
        """Return what is held under a path; a weight that a parametrization computes is not held."""
        owner_path, _, name = path.rpartition(".")
        try:
            owner = self._graph_module.get_submodule(owner_path)
        except AttributeError:
            return _MISSING
        for table in (owner._parameters, owner._buffers, vars(owner)):
            if name in table:
                return table[name]
        return _MISSING


def _is_random(node: Node) -> bool:
    name = function_name(node.target)
    return "dropout" in name or name.rstrip("_") in _RANDOM_NAMES or name.startswith("rand")


_RANDOM_NAMES = frozenset(
    {
        *("bernoulli", "binomial", "cauchy", "exponential", "geometric", "gumbel_softmax", "log_normal"),
        *("multinomial", "normal", "poisson", "rrelu", "uniform"),
    }
)
