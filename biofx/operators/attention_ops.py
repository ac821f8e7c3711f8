"""Attention as a function of its weights: what ``nn.MultiheadAttention`` computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from biofx.errors import InputError


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
    options: dict[str, Any] = {
        "num_heads": num_heads,
        "in_proj_bias": in_proj_bias,
        "out_proj_bias": out_proj_bias,
        "bias_k": bias_k,
        "bias_v": bias_v,
        "add_zero_attn": add_zero_attn,
        "dropout": dropout,
        "batch_first": batch_first,
        "key_padding_mask": key_padding_mask,
        "need_weights": need_weights,
        "attn_mask": attn_mask,
        "average_attn_weights": average_attn_weights,
        "is_causal": is_causal,
    }
    given = (query, key, value, *weights, training, *options.values())
    if has_torch_function(given):
        return handle_torch_function(attend, given, query, key, value, weights, training, **options)
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
