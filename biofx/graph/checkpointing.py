"""Calls of modules under ``torch.utils.checkpoint`` as nodes: the module has a graph of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Proxy
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from biofx.errors import CaptureError


def call_checkpointed(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """Call a module and forget what it computes on the way; backwards, it is called again.

    Args:
        module: a submodule of the one whose graph this is in.
        args: its positional arguments.
        kwargs: its keyword arguments.
        options: how ``torch.utils.checkpoint.checkpoint`` is to do it.

    Raises:
        CaptureError: the graph is being traced again, which would lose the checkpointing.
    """
    if any(isinstance(leaf, Proxy) for leaf in pytree.tree_leaves((args, dict(kwargs)))):
        raise CaptureError(
            "a graph that calls a module under torch.utils.checkpoint cannot be traced again; copy it "
            "(copy.deepcopy, pickle) or transform it as it is"
        )
    return checkpoint(module, *args, **options, **kwargs)


def checkpointed_path(node: Node) -> str | None:
    """Return the path of the module that a node calls under checkpointing, None if it does not."""
    if node.target is not call_checkpointed:
        return None
    module: Any = node.args[0]
    return str(module.target)


def checkpoints(graph: Graph) -> bool:
    """Whether a graph calls modules under checkpointing."""
    return bool(graph.find_nodes(op="call_function", target=call_checkpointed))
