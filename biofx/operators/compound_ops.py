"""Layers with several weights as functions of them: recurrent layers and multi-head attention of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from biofx.errors import InputError
from biofx.operators.dispatch import overridable

_CELLS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
    "GRU": torch.gru,
    "LSTM": torch.lstm,
}
_STEPS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
    "GRU": torch.gru_cell,
    "LSTM": torch.lstm_cell,
}
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}
"""How many matrices, one for each gate, are stacked in a weight, by mode."""


@overridable
def recurrent(
    x: Any,
    state: Any,
    weights: Sequence[Tensor],
    training: bool,
    *,
    mode: str,
    num_layers: int = 1,
    dropout: float = 0.0,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> Any:
    """Return what a recurrent layer of torch returns: the output, and the state at the end.

    Args:
        x: ``(time, batch, features)``, ``(batch, time, features)`` if ``batch_first``, ``(time, features)``
            for one sequence alone, or a ``PackedSequence``.
        state: the hidden state at the start, ``(layers * directions, batch, hidden)``; of an LSTM a pair,
            hidden and cell; None for zeros.
        weights: for each layer and direction the weights ih and hh, then the biases ih and hh if there are
            any, then the projection hr if there is one, in torch's order.
        training: whether dropout acts.
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"``.
        num_layers: layers on top of each other, a count.
        dropout: probability with which an output of a layer but the last is dropped in training.
        bidirectional: whether a second set of weights reads the sequence from its end.
        batch_first: whether the batch axis is the first one; not of states.

    Raises:
        InputError: the input or the state has a shape that does not fit the weights.
    """
    chains = num_layers * (2 if bidirectional else 1)
    options = (list(weights), len(weights) // chains > 3, num_layers, dropout, training, bidirectional)
    if isinstance(x, PackedSequence):
        _check_input(x.data, (2,), weights, mode)
        start = _start(state, x.data, weights, mode, chains, x.batch_sizes[0])
        output, *end = _CELLS[mode](x.data, x.batch_sizes, _permuted(start, x.sorted_indices, mode), *options)
        packed = PackedSequence(output, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return packed, _permuted(_state(end, mode), x.unsorted_indices, mode)
    _check_input(x, (2, 3), weights, mode)
    batch_axis = 0 if batch_first else 1
    if x.dim() == 2:
        if state is not None:
            state = _state([entry.unsqueeze(1) for entry in _entries(state, mode)], mode)
        batched = x.unsqueeze(batch_axis)
        start = _start(state, batched, weights, mode, chains, 1)
        output, *end = _CELLS[mode](batched, start, *options, batch_first)
        return output.squeeze(batch_axis), _state([entry.squeeze(1) for entry in end], mode)
    start = _start(state, x, weights, mode, chains, x.size(batch_axis))
    output, *end = _CELLS[mode](x, start, *options, batch_first)
    return output, _state(end, mode)


@overridable
def recurrent_step(x: Tensor, state: Any, weights: Sequence[Tensor], *, mode: str) -> Any:
    """Return what a cell of torch (``nn.RNNCell``, …) returns: the state a step later.

    Args:
        x: ``(batch, features)``, or ``(features,)`` for one sequence alone.
        state: the hidden state, ``(batch, hidden)`` or ``(hidden,)``; of an LSTM a pair, hidden and cell;
            None for zeros.
        weights: the weights ih and hh, then the biases ih and hh if there are any.
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"``.

    Raises:
        InputError: the input or the state has a shape that does not fit the weights.
    """
    _check_input(x, (1, 2), weights, mode)
    batched = x if x.dim() == 2 else x.unsqueeze(0)
    size = weights[1].size(1)
    if state is None:
        zeros = torch.zeros(batched.size(0), size, dtype=x.dtype, device=x.device)
        entries = [zeros, zeros] if mode == "LSTM" else [zeros]
    else:
        entries = _entries(state, mode)
        for entry in entries:
            if entry.dim() != x.dim() or entry.size(-1) != size:
                raise InputError(
                    f"{mode}: expected a state of {x.dim()} axes, the last one of {size} units, found shape "
                    f"{tuple(entry.shape)}"
                )
        entries = entries if x.dim() == 2 else [entry.unsqueeze(0) for entry in entries]
    made = _STEPS[mode](batched, _state(entries, mode), *weights)
    after = list(made) if mode == "LSTM" else [made]
    return _state(after if x.dim() == 2 else [entry.squeeze(0) for entry in after], mode)


def _entries(state: Any, mode: str) -> list[Tensor]:
    return list(state) if mode == "LSTM" else [state]


def _state(entries: Sequence[Tensor], mode: str) -> Any:
    return tuple(entries) if mode == "LSTM" else entries[0]


def _permuted(state: Any, order: Tensor | None, mode: str) -> Any:
    if order is None:
        return state
    return _state([entry.index_select(1, order) for entry in _entries(state, mode)], mode)


def _start(state: Any, x: Tensor, weights: Sequence[Tensor], mode: str, chains: int, batch: Any) -> Any:
    """Return the state at the start: the one given, if its shape is right, or zeros."""
    hidden = weights[1]  # (gates * hidden, hidden), or (gates * hidden, projected)
    sizes = (hidden.size(1), hidden.size(0) // GATES[mode]) if mode == "LSTM" else (hidden.size(1),)
    if state is None:
        zeros = [torch.zeros(chains, batch, size, dtype=x.dtype, device=x.device) for size in sizes]
        return _state(zeros, mode)
    for entry, size in zip(_entries(state, mode), sizes, strict=True):
        if entry.size() != (chains, batch, size):
            raise InputError(
                f"{mode}: expected a state of shape {(chains, int(batch), size)} (layers and directions, "
                f"batch, units), found {tuple(entry.shape)}"
            )
    return tuple(state) if mode == "LSTM" else state


def _check_input(x: Tensor, ranks: tuple[int, ...], weights: Sequence[Tensor], mode: str) -> None:
    if x.dim() not in ranks or x.size(-1) != weights[0].size(1):
        raise InputError(
            f"{mode}: expected an input of {' or '.join(map(str, ranks))} axes, the last one of "
            f"{weights[0].size(1)} features, found shape {tuple(x.shape)}"
        )


@overridable
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Sequence[Tensor],
    training: bool,
    *,
    num_heads: int,
    in_proj_bias: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    add_zero_attn: bool = False,
    dropout: float = 0.0,
    batch_first: bool = False,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Return what multi-head attention of torch returns: the output, and the attention or None.

    Args:
        query: ``(targets, batch, embed)``, ``(batch, targets, embed)`` if ``batch_first``, or
            ``(targets, embed)``.
        key: likewise, ``(sources, batch, features)``.
        value: likewise, ``(sources, batch, features)``.
        weights: the joint input projection ``(3 * embed, embed)`` and the output projection, or the
            projections of query, key and value and that of the output.
        training: whether dropout acts.
        num_heads: heads, a count.
        in_proj_bias: ``(3 * embed,)``.
        out_proj_bias: ``(embed,)``.
        bias_k: ``(1, 1, embed)``, a key that is added to the sequence.
        bias_v: likewise for the values.
        add_zero_attn: whether a key and a value of zeros are added.
        dropout: probability with which an attention weight is dropped in training.
        batch_first: whether the batch axis is the first one.
        key_padding_mask: ``(batch, sources)``, as ``nn.MultiheadAttention`` takes it.
        need_weights: whether the attention is returned.
        attn_mask: ``(targets, sources)`` or ``(batch * heads, targets, sources)``, likewise.
        average_attn_weights: whether the attention is averaged over the heads.
        is_causal: whether ``attn_mask`` is the causal one.

    Raises:
        InputError: an input is a nested tensor, which only torch's fused inference path takes.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        raise InputError(
            "attend: expected plain tensors, found a nested one; pad the sequences and pass key_padding_mask"
        )
    swapped = batch_first and query.dim() == 3
    if swapped:
        query, key, value = _time_first(query, key, value)
    *inputs, output_weight = weights
    joint = len(inputs) == 1
    q_weight, k_weight, v_weight = (None, None, None) if joint else inputs
    output, attention = F.multi_head_attention_forward(
        query,
        key,
        value,
        output_weight.size(0),
        num_heads,
        inputs[0] if joint else None,
        in_proj_bias,
        bias_k,
        bias_v,
        add_zero_attn,
        dropout,
        output_weight,
        out_proj_bias,
        training=training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight=not joint,
        q_proj_weight=q_weight,
        k_proj_weight=k_weight,
        v_proj_weight=v_weight,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return (output.transpose(1, 0) if swapped else output), attention


def _time_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Swap batch and time; what is one tensor stays one, which torch then projects in one product."""
    keys = key.transpose(1, 0)
    values = keys if value is key else value.transpose(1, 0)
    return (keys if query is key else query.transpose(1, 0)), keys, values
