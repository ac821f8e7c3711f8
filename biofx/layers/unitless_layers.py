"""Layers whose weight is not from one unit to another, embeddings and bilinear ones: their calls, lowered."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Node

from biofx.layers.layer_kinds import BILINEAR, LayerKind

Reads = Callable[[str], Node]
"""Returns the node that reads what a module has under a name."""

_LOOKUP_OPTIONS: dict[str, Any] = {
    "padding_idx": None,
    "max_norm": None,
    "norm_type": 2.0,
    "scale_grad_by_freq": False,
    "mode": "mean",
    "sparse": False,
    "include_last_offset": False,
}
"""What the functions that look up take besides tensors, and the values that say nothing new."""


def lower_unitless(node: Node, module: nn.Module, kind: LayerKind, reads: Reads) -> None:
    """Rewrite a node in place, as a call of the function on a visible weight; its results are the same."""
    given = inspect.signature(kind.module_type.forward).bind(module, *node.args, **node.kwargs).arguments
    given.pop("self")
    weight = reads("weight")
    if kind is BILINEAR:
        bias = None if module.bias is None else reads("bias")
        args: tuple[Any, ...] = (given["input1"], given["input2"], weight)
        args, options = args if bias is None else (*args, bias), {}
    else:
        args = (given.pop("input"), weight)
        held = {name: getattr(module, name, neutral) for name, neutral in _LOOKUP_OPTIONS.items()}
        told = {name: value for name, value in held.items() if value != _LOOKUP_OPTIONS[name]}
        options = {**{name: value for name, value in given.items() if value is not None}, **told}
    node.op, node.target, node.args, node.kwargs = "call_function", kind.function, args, options


def obstacle_to_lookup(node: Node, module: nn.Module | None, kind: LayerKind) -> str | None:
    """Return why the gradient of a looked-up weight is left alone, None if it is not.

    Args:
        node: the call.
        module: what it calls, None if it calls the function.
        kind: what kind of layer it is.
    """
    if kind is BILINEAR:
        return None
    options = _given(node, kind) if module is None else vars(module)
    if options.get("max_norm") is not None:
        return "its forward changes its weight in place (max_norm)"
    if options.get("sparse", False) is not False:
        return "its gradient is sparse, and factors are dense (sparse=True)"
    return None


def _given(node: Node, kind: LayerKind) -> dict[str, Any]:
    bound: dict[str, Any] = inspect.signature(kind.function).bind(*node.args, **node.kwargs).arguments
    return bound
