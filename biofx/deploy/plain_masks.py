"""What torch's Transformer layers ask about masks, for a graph that no longer knows biofx.

torch answers these questions in Python, by looking at types and values; a graph module that is loaded is
traced anew, when there are neither. So the answers are worked out with operations, or settled.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from biofx.deploy.settling import settle
from biofx.errors import PassError
from biofx.layers.transformer_layers import canonical_mask, detects_causal_mask, sequence_length


def write_out_masks(own: GraphModule) -> None:
    """Settle what is asked about masks, and write out what makes masks ready to be added.

    Whether a mask is the causal one only decides who applies it, attention's kernel or an addition; the mask
    is there, so the answer is that it is not. Where the caller says that it is, that is believed, as it is by
    torch.

    Raises:
        PassError: what the caller says is known only when the model runs.
    """
    ready: set[Node] = set()
    for node in list(own.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is detects_causal_mask:
            said = node.kwargs.get("is_causal", node.args[1] if len(node.args) > 1 else None)
            if isinstance(said, Node):
                raise PassError(
                    f"{node.name!r}: whether the mask is causal is known only when the model runs, and a "
                    "plain graph cannot ask; deploy a model that gives is_causal as a constant, or not at all"
                )
            settle(node, said is True)
        elif node.target is canonical_mask:
            with own.graph.inserting_before(node):
                made = _canonical(own, node, ready)
            ready.add(made)
            node.replace_all_uses_with(made)
            own.graph.erase_node(node)
    for node in reversed(own.graph.nodes):
        if node.target is sequence_length and not node.users:
            own.graph.erase_node(node)


def _canonical(own: GraphModule, node: Node, ready: set[Node]) -> Node:
    """Insert what leaves a mask to be added as it is, and makes one of flags 0 and minus infinity."""

    def call(target: str | Callable[..., Any], *args: Any) -> Node:
        made = own.graph.create_node(
            "call_method" if isinstance(target, str) else "call_function", target, args
        )
        made.meta = dict(node.meta)
        return made

    mask: Any
    mask, target_type = node.args[0], node.args[4] if len(node.args) > 4 else node.kwargs["target_type"]
    if mask in ready:  # made ready already, by the stack that a layer is in
        return call("to", mask, target_type)
    has_flags = call(operator.eq, call("is_floating_point", mask), False)
    blocked = call(operator.mul, call("to", mask, torch.bool), has_flags)  # a number, for TorchScript
    return call("masked_fill", call("to", mask, target_type), call("to", blocked, torch.bool), -math.inf)
