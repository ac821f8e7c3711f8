"""Nodes that ask for what a value is, and not for what is in it."""

from __future__ import annotations

from torch.fx import Node


def asks_for_a_size(node: Node) -> bool:
    """Whether a node asks a value for its size, type or place, and not for what is in it."""
    if node.op == "call_method":
        return node.target in _SIZES
    return node.target is getattr and node.args[1] in ("shape", *_SIZES)


_SIZES = frozenset(
    {"size", "dim", "numel", "device", "dtype", "element_size", "get_device", "itemsize", "nbytes"}
)
