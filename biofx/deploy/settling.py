"""Constants in the place of nodes whose value is known once a model is deployed."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from biofx.model.graph_places import module_at


def settle(node: Node, value: Any) -> None:
    """Put a constant where a node was read, and take the node out."""

    def settled(source: Node) -> Any:
        return value if source is node else source

    for user in list(node.users):
        user.args, user.kwargs = map_arg(user.args, settled), map_arg(user.kwargs, settled)
    node.graph.erase_node(node)


def settle_settings(graph_module: GraphModule) -> None:
    """Put what settings of modules are now, numbers and flags, where the graph reads them; in evaluation."""
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
        elif node.target is getattr and isinstance(node.args[0], Node) and node.args[0].op == "get_attr":
            owner, name = str(node.args[0].target), str(node.args[1])
        else:
            continue
        module = module_at(graph_module, owner)
        held = {} if module is None else vars(module)
        if name in held and isinstance(held[name], (int, float, type(None))):
            settle(node, False if name == "training" else held[name])
