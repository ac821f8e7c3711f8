"""Which values a node changes in place: ``x += y``, ``x[i] = y`` and methods that end in ``_``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Node

AUGMENTED_ASSIGNMENTS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("ilshift", "irshift", "iand", "ior", "ixor"),
)
"""Names of the operators that change what stands on their left, where that can be changed."""

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


def changes_in_place(node: Node) -> bool:
    """Whether a node writes to something instead of, or besides, computing a value."""
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
