"""What single nodes do: change a value in place, read a number of a module, query metadata of a tensor."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

AUGMENTED_ASSIGNMENTS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("ilshift", "irshift", "iand", "ior", "ixor"),
)
"""Names of the operators that change their left operand where it is mutable."""

_IN_PLACE_FUNCTIONS: frozenset[Any] = frozenset(
    {operator.setitem, operator.delitem, setattr, delattr}
    | {getattr(operator, name) for name in AUGMENTED_ASSIGNMENTS}
)
_IN_PLACE_METHODS = frozenset(
    {"__setitem__", "__delitem__", *(f"__{name}__" for name in AUGMENTED_ASSIGNMENTS)}
)
_VIEWS: frozenset[Any] = frozenset({getattr, operator.getitem, torch.chunk, torch.split, torch.transpose})
_VIEW_METHODS = frozenset(
    {
        *("__getitem__", "chunk", "detach", "diagonal", "expand", "flatten", "movedim", "narrow", "permute"),
        *("reshape", "select", "split", "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten"),
        *("unsqueeze", "view", "view_as"),
    }
)
_METADATA = frozenset(
    {"size", "dim", "numel", "device", "dtype", "element_size", "get_device", "itemsize", "nbytes"}
)
IS_NUMBER = "auxiliary_number"
"""Key in the ``meta`` of a node that reads a number, while a graph is captured."""


def changes_in_place(node: Node) -> bool:
    """Whether a node writes to a value instead of, or besides, computing one."""
    if node.op == "call_module":
        return getattr(_called_module(node), "inplace", False) is True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op.startswith("call") and (
        "out" in node.kwargs
        or node.kwargs.get("inplace") is True
        or node.target in _IN_PLACE_FUNCTIONS
        or name in _IN_PLACE_METHODS
        or (name.endswith("_") and not name.endswith("__"))
    )


def changed_in_place(node: Node) -> list[Node]:
    """Return the nodes whose value a node changes: what it writes to, and what that is a view of."""
    base: Any = None
    if changes_in_place(node):
        base = node.kwargs.get("out", node.args[0] if node.args else None)
    changed: list[Node] = []
    while isinstance(base, Node):
        changed.append(base)
        is_view = base.target in _VIEWS or (base.op == "call_method" and base.target in _VIEW_METHODS)
        base = base.args[0] if (is_view or base.target in _IN_PLACE_FUNCTIONS) and base.args else None
    return changed


def _called_module(node: Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(str(node.target))


def queries_metadata(node: Node) -> bool:
    """Whether a node queries the size, dtype or device of a tensor, and not its values."""
    if node.op == "call_method":
        return node.target in _METADATA
    return node.target is getattr and node.args[1] in ("shape", *_METADATA)


def number_read(graph_module: GraphModule | None, node: Node) -> int | float | None:
    """Return the present value of the number that a node reads from a module, None if it reads none."""
    if node.op != "get_attr":
        return None
    found: Any = graph_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found if _is_plain_number(found) else None


def is_number(graph_module: GraphModule | None, node: Node) -> bool:
    """Whether a node reads a number of a module, or computes with such numbers alone."""
    if number_read(graph_module, node) is not None:
        return True
    sources = node.all_input_nodes
    return _is_arithmetic(node) and bool(sources) and all(is_number(graph_module, s) for s in sources)


def number_nodes(graph_module: GraphModule, graph: Graph) -> dict[Node, int | float]:
    """Return the nodes that read numbers of modules or compute with them alone, and their present values."""
    values: dict[Node, int | float] = {}
    for node in graph.nodes:
        found: Any = number_read(graph_module, node)
        sources = node.all_input_nodes
        if _is_arithmetic(node) and sources and all(source in values for source in sources):
            found = _computed(node, values)
        if _is_plain_number(found):
            values[node] = found
    return values


def _is_plain_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _computed(node: Node, values: dict[Node, int | float]) -> Any:
    function: Any = node.target
    args = [values[value] if isinstance(value, Node) else value for value in node.args]
    try:
        return function(*args)
    except (ArithmeticError, ValueError, TypeError):
        return None


def _is_arithmetic(node: Node) -> bool:
    home = getattr(node.target, "__module__", "")
    return node.op == "call_function" and not node.kwargs and home in ("_operator", "math")
