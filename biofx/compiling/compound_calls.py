"""Layers with several weights in a graph of dynamo: calls of torch become those that passes know."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import functional as F

from biofx.capture.exported_layers import nest_states
from biofx.layers.layer_kind import become_call
from biofx.operators.compound_ops import attend, recurrent

_MODES: Mapping[Any, str] = {
    torch.rnn_tanh: "RNN_TANH",
    torch.rnn_relu: "RNN_RELU",
    torch.gru: "GRU",
    torch.lstm: "LSTM",
}
_OPTIONS = ("has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


def show_weights_of_compounds(graph: Graph) -> None:
    """Let attention and recurrent layers show their weights as lowered layers do.

    Dynamo keeps a recurrent layer in its graph where ``torch._dynamo.config.allow_rnn`` is set. Packed
    sequences stay calls of torch.
    """
    for node in graph.find_nodes(op="call_function", target=F.multi_head_attention_forward):
        _become_attention(node)
    for target, mode in _MODES.items():
        for node in graph.find_nodes(op="call_function", target=target):
            _become_recurrent(node, mode)


def _become_attention(node: Node) -> None:
    found = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    found.apply_defaults()
    given: dict[str, Any] = dict(found.arguments)
    if given.pop("static_k") is not None or given.pop("static_v") is not None:
        return
    separate = given.pop("use_separate_proj_weight")
    projections = [given.pop(name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    joint, output = given.pop("in_proj_weight"), given.pop("out_proj_weight")
    weights = [*(projections if separate else [joint]), output]
    inputs = [given.pop(name) for name in ("query", "key", "value")]
    given.pop("embed_dim_to_check")
    given["dropout"] = given.pop("dropout_p")
    become_call(node, attend, (*inputs, weights, given.pop("training")), given)


def _become_recurrent(node: Node, mode: str) -> None:
    arguments: tuple[Any, ...] = node.args
    x, state, weights, *further = arguments
    is_packed = not isinstance(weights, (list, tuple))
    picks = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    if is_packed or not picks or len(further) != len(_OPTIONS):
        return
    given: dict[str, Any] = dict(zip(_OPTIONS, further, strict=True))
    training = given.pop("train")
    del given["has_biases"]  # the number of weights says it
    if mode == "LSTM":
        nest_states(node)
    become_call(node, recurrent, (x, state, list(weights), training), {"mode": mode, **given})
