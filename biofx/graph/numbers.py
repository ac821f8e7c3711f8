"""Nodes that read a number of a module, and what they are worth."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

IS_NUMBER = "auxiliary_number"
"""The mark of a node that reads a number, while a graph is captured."""


def number_read(graph_module: GraphModule | None, node: Node) -> int | float | None:
    """Return the number that a node reads at this moment, None if it reads none."""
    if node.op != "get_attr":
        return None
    found: Any = graph_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def is_number(graph_module: GraphModule | None, node: Node) -> bool:
    """Whether a node reads a number, or computes with such numbers alone."""
    if number_read(graph_module, node) is not None:
        return True
    sources = node.all_input_nodes
    return _is_arithmetic(node) and bool(sources) and all(is_number(graph_module, s) for s in sources)


def number_nodes(graph_module: GraphModule, graph: Graph) -> dict[Node, int | float]:
    """Return the nodes of a graph that read numbers or compute with them alone, and what they are worth."""
    worth: dict[Node, int | float] = {}
    for node in graph.nodes:
        found: Any = number_read(graph_module, node)
        sources = node.all_input_nodes
        if _is_arithmetic(node) and sources and all(source in worth for source in sources):
            found = _computed(node, worth)
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            worth[node] = found
    return worth


def _computed(node: Node, worth: dict[Node, int | float]) -> Any:
    function: Any = node.target
    args = [worth[value] if isinstance(value, Node) else value for value in node.args]
    try:
        return function(*args)
    except (ArithmeticError, ValueError, TypeError):
        return None


def _is_arithmetic(node: Node) -> bool:
    home = getattr(node.target, "__module__", "")
    return node.op == "call_function" and not node.kwargs and home in ("_operator", "math")
