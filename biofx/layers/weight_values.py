"""What a graph computes from weights alone, computed once and for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from biofx.layers.constant_part import ConstantPart


@torch.no_grad()
def evaluate_weights(own: GraphModule) -> None:
    """Replace what biofx computes from parameters and buffers alone by its value, a parameter."""
    constants = ConstantPart(own)
    values: dict[Node, Any] = {}
    for node in own.graph.nodes:
        if node.op == "get_attr" or node not in constants:
            continue
        if is_of_biofx(node.target) or any(source in values for source in node.all_input_nodes):
            values[node] = constants.value(node, values)
    unread = {node for node in own.graph.nodes if not node.users}
    for node in list(own.graph.nodes):
        if node in values and any(user not in values for user in node.users):
            path = _root_path(node)
            owner, _, name = path.rpartition(".")
            trained = getattr(own.get_submodule(owner), name).requires_grad
            _replace(own, node, nn.Parameter(values[node].clone(), requires_grad=trained), path)
    for node in reversed(own.graph.nodes):
        if not node.users and node in constants and node not in unread:
            own.graph.erase_node(node)
    erase_unused_reads(own)


def erase_unused_reads(own: GraphModule) -> None:
    """Erase reads of attributes that nothing uses; other nodes without a user may be there for an effect."""
    for node in own.graph.find_nodes(op="get_attr"):
        if not node.users:
            own.graph.erase_node(node)


def _root_path(node: Node) -> str:
    """Return the path of the parameter that a weight expression starts from."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _replace(own: GraphModule, node: Node, value: nn.Parameter, path: str) -> None:
    """Let a node read a parameter, kept beside the one that it was computed from."""
    owner_path, _, name = path.rpartition(".")
    owner = own.get_submodule(owner_path)
    number = 1
    while hasattr(owner, f"{name}_{number}"):
        number += 1
    owner.register_parameter(f"{name}_{number}", value)
    with node.graph.inserting_before(node):
        read = node.graph.create_node("get_attr", f"{path}_{number}", name=f"{node.name}_value")
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)


def is_of_biofx(thing: Any) -> bool:
    """Whether a function or a class is one of biofx's own."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "biofx"
