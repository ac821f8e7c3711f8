"""Constants in the place of nodes whose value is known once a model is deployed."""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg


def settle(node: Node, value: Any) -> None:
    """Put a constant where a node was read, and take the node out."""

    def settled(source: Node) -> Any:
        return value if source is node else source

    for user in list(node.users):
        user.args, user.kwargs = map_arg(user.args, settled), map_arg(user.kwargs, settled)
    node.graph.erase_node(node)
