"""Turn the call of a recurrent layer or an attention into a call of its function on visible weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Node

from biofx.layers.layer_kinds import ATTENTION, LayerKind
from biofx.layers.weight_slots import slots_of_module

Reads = Callable[[str], Node]
"""Returns the node that reads what a module has under a name."""


def lower_compound(node: Node, module: nn.Module, kind: LayerKind, reads: Reads) -> None:
    """Rewrite a node in place; ``reads`` brings the weights, biases and settings into the graph."""
    given = inspect.signature(kind.module_type.forward).bind(module, *node.args, **node.kwargs).arguments
    given.pop("self")
    lower = _attention if kind is ATTENTION else _recurrent
    args, options = lower(given, module, kind, reads)
    node.op = "call_function"
    node.target = kind.function
    node.args = args
    node.kwargs = {
        name: value for name, value in options.items() if name not in _NEUTRAL or value != _NEUTRAL[name]
    }


_NEUTRAL: dict[str, Any] = {
    "num_layers": 1,
    "dropout": 0.0,
    "bidirectional": False,
    "batch_first": False,
    "in_proj_bias": None,
    "out_proj_bias": None,
    "bias_k": None,
    "bias_v": None,
    "add_zero_attn": False,
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "average_attn_weights": True,
    "is_causal": False,
}


def _recurrent(
    given: dict[str, Any], module: Any, kind: LayerKind, reads: Reads
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    weights = [reads(name) for name in module._flat_weights_names]
    options = {name: getattr(module, name) for name in ("mode", "num_layers", "bidirectional", "batch_first")}
    options["dropout"] = reads("dropout")  # which may be changed at any time
    return (given["input"], given.get("hx"), weights, reads("training")), options


def _attention(
    given: dict[str, Any], module: Any, kind: LayerKind, reads: Reads
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = [given.pop(name) for name in ("query", "key", "value")]
    weights = [reads(slot.name) for slot in slots_of_module(module, kind)]
    options = {name: getattr(module, name) for name in ("num_heads", "add_zero_attn", "batch_first")}
    options["dropout"] = reads("dropout")  # which may be changed at any time
    biases = {
        "in_proj_bias": module.in_proj_bias,
        "out_proj.bias": module.out_proj.bias,
        "bias_k": module.bias_k,
        "bias_v": module.bias_v,
    }
    for name, bias in biases.items():
        options[name.replace(".", "_")] = None if bias is None else reads(name)
    return (*inputs, weights, reads("training")), {**options, **given}
