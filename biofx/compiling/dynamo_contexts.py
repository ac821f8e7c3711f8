"""Contexts in graphs of dynamo (``torch.no_grad``, ``torch.autocast``) as pairs of nodes, and back.

Passes must know which nodes are in a context: what is computed in one has no gradient, or another type,
outside. Dynamo writes switches of the gradient mode, of which each says what holds from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from biofx.graph.contexts import begin_autocast, begin_grad_mode, end_autocast, end_grad_mode
from biofx.layers.layer_kind import become_call
from biofx.torch_private import enter_autocast, exit_autocast, set_grad_enabled

_BEFORE = "mode_before"


def pair_contexts(graph: Graph) -> None:
    """Replace what dynamo writes where a context begins and ends by the nodes that biofx writes.

    Args:
        graph: traced with gradients as they are now; changed in place.
    """
    anchor = next(iter(graph.find_nodes(op="placeholder")), None)
    mode, open_modes = torch.is_grad_enabled(), list[tuple[Node, bool]]()
    for node in list(graph.nodes) if anchor is not None else ():
        if node.target is enter_autocast:
            become_call(node, begin_autocast, (anchor, *node.args))
        elif node.target is exit_autocast:
            become_call(node, end_autocast, node.args)
        elif node.target is set_grad_enabled:
            (enabled,) = node.args
            if open_modes and open_modes[-1][1] is enabled:
                begin, node.meta[_BEFORE] = open_modes.pop()
                become_call(node, end_grad_mode, (begin,))
            else:
                become_call(node, begin_grad_mode, (anchor, enabled))
                open_modes.append((node, mode))
            mode = bool(enabled)


def plain_context(node: Node) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """Return what dynamo writes for a node that begins or ends a context, None for any other."""
    if node.target is begin_autocast:
        return enter_autocast, tuple(node.args[1:])
    if node.target is end_autocast:
        return exit_autocast, tuple(node.args)
    if node.target is begin_grad_mode:
        return set_grad_enabled, (node.args[1],)
    if node.target is end_grad_mode:
        return set_grad_enabled, (node.meta[_BEFORE],)
    return None
