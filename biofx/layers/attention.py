"""Attention, and torch's Transformer layers around it.

A tracer takes layers of torch for one call each. The forwards of Transformer layers are plain Python, and can
be traced, but for three things: a fused path for inference, which is switched off here, and two questions
about masks, which become calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, Proxy
from torch.nn import functional as F
from torch.nn.modules import transformer
from torch.overrides import handle_torch_function, has_torch_function

from biofx import torch_private
from biofx.layers.layer_kind import (
    LayerCall,
    LayerKind,
    LoweredCall,
    Reads,
    WeightSlot,
    argument,
    become_call,
    hooks_of,
    without_neutral,
)
from biofx.operators.compound_ops import attend

_WEIGHTS = (3, "weights")
_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_BIASES = {
    "in_proj_bias": "in_proj_bias",
    "out_proj_bias": "out_proj.bias",
    "bias_k": "bias_k",
    "bias_v": "bias_v",
}
"""Where the module holds them, by the function's argument."""
_INPUTS = {
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "average_attn_weights": True,
    "is_causal": False,
}
"""What the module is called with besides query, key and value."""
_NEUTRAL = {**dict.fromkeys(_BIASES), **_INPUTS, "dropout": 0.0, "batch_first": False, "add_zero_attn": False}


class AttentionKind(LayerKind):
    """Multi-head attention of torch, with one projection of its inputs or with three."""

    def slots_of_module(self, module: Any) -> tuple[WeightSlot, ...]:
        """Return the slots of the projections."""
        return _slots(joint=torch_private.has_one_embedding_size(module))

    def slots_of_call(self, node: Node) -> tuple[WeightSlot, ...]:
        """Return the slots of the projections among the weights."""
        return _slots(joint=len(argument(node, *_WEIGHTS)) == 2)

    def lower(self, node: Node, module: Any, reads: Reads) -> None:
        """Rewrite ``attention(q, k, v)`` as ``attend(q, k, v, weights, training, …)``."""
        bound = inspect.signature(self.module_type.forward).bind(module, *node.args, **node.kwargs)
        given = bound.arguments
        given.pop("self")
        inputs = [given.pop(name) for name in ("query", "key", "value")]
        weights = [reads(slot.name) for slot in self.slots_of_module(module)]
        options = {name: getattr(module, name) for name in ("num_heads", "add_zero_attn", "batch_first")}
        options["dropout"] = reads("dropout")  # which may be changed at any time
        biases = (module.in_proj_bias, module.out_proj.bias, module.bias_k, module.bias_v)
        for (name, path), bias in zip(_BIASES.items(), biases, strict=True):
            options[name] = None if bias is None else reads(path)
        args = (*inputs, weights, reads("training"))
        become_call(node, self.function, args, without_neutral(options | given, _NEUTRAL))

    def raised(self, call: LoweredCall) -> LayerCall | None:
        """Return the call of a module with the same projections and biases."""
        arguments: tuple[Any, ...] = call.node.args
        query, key, value, (*projections, output), _ = arguments
        options: dict[str, Any] = dict(call.node.kwargs)
        inputs = {name: options.pop(name) for name in _INPUTS if name in options}
        biases = {path: options.pop(name, None) for name, path in _BIASES.items()}
        joint = len(projections) == 1
        paths = ("in_proj_weight",) if joint else _PROJECTIONS
        held = call.parameters(
            {**dict(zip(paths, projections, strict=True)), "out_proj.weight": output, **biases}
        )
        size: Any = held["out_proj.weight"]
        sizes = (size.shape[0], options.pop("num_heads"))
        if not joint:
            key_weight, value_weight = (held[path] for path in _PROJECTIONS[1:])
            options |= {"kdim": key_weight.shape[1], "vdim": value_weight.shape[1]}  # type: ignore[union-attr]
        options |= {"bias": biases["in_proj_bias"] is not None, "add_bias_kv": biases["bias_k"] is not None}
        return call.call(self.module_type, sizes, held, (query, key, value), inputs, **options)


def _slots(*, joint: bool) -> tuple[WeightSlot, ...]:
    if joint:
        names = [("in_proj_weight", "query_key_value", 3)]
    else:
        names = [(name, role, 1) for name, role in zip(_PROJECTIONS, ("query", "key", "value"), strict=True)]
    names.append(("out_proj.weight", "attention_output", 1))
    return tuple(
        WeightSlot(name, role, _WEIGHTS, index, blocks) for index, (name, role, blocks) in enumerate(names)
    )


ATTENTION = AttentionKind(nn.MultiheadAttention, attend, is_compound=True)


# Transformer layers

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)


def can_be_looked_into(module: nn.Module) -> bool:
    """Whether a module is one of torch's Transformer layers or stacks, as torch made it."""
    if type(module) not in (*_LAYERS, *_STACKS, nn.Transformer) or hooks_of(module):
        return False
    if "forward" in vars(module):
        return False
    if isinstance(module, nn.Transformer):
        return type(module.encoder) in _STACKS and type(module.decoder) in _STACKS
    if isinstance(module, _LAYERS):
        activation = module.activation
        return isinstance(activation, nn.Module) or str(activation.__module__).startswith("torch")
    layers: Any = module.layers
    return all(type(layer) in _LAYERS for layer in layers)


def pads_by_nesting(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call lets an encoder nest padded sequences in evaluation, which zeroes the padded outputs."""
    if type(module) is not nn.TransformerEncoder or not module.use_nested_tensor:
        return False
    given = inspect.signature(nn.TransformerEncoder.forward).bind(module, *args, **kwargs).arguments
    return given.get("src_key_padding_mask") is not None


@contextmanager
def transformers_as_nodes() -> Iterator[None]:
    """Let the forwards of Transformer layers be traced."""
    originals = [
        (owner, function.__name__, getattr(owner, function.__name__)) for owner, function, *_ in _ABOUT_MASKS
    ]
    try:
        for (*_, as_node, about), (owner, name, original) in zip(_ABOUT_MASKS, originals, strict=True):
            setattr(owner, name, _traced(original, as_node, about))
        with plain_paths():
            yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextmanager
def plain_paths() -> Iterator[None]:
    """Let Transformer layers compute in evaluation what they do in training, without their fused path.

    Which rounds otherwise, and hands the weights on to one operator.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def canonical_mask(
    mask: Tensor, mask_name: str, other_type: Any, other_name: str, target_type: Any, check_other: bool = True
) -> Any:
    """Return a mask as one to be added; ``other_type`` may be the other mask itself, for its dtype."""
    given = (mask, other_type, target_type)
    if has_torch_function(given):
        return handle_torch_function(
            canonical_mask, given, mask, mask_name, other_type, other_name, target_type, check_other
        )
    other = other_type.dtype if isinstance(other_type, Tensor) else other_type
    return torch_private.canonical_mask(mask, mask_name, other, other_name, target_type, check_other)


def detects_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Return whether a mask is the causal one of a size, or what the caller says about it."""
    given = (mask, is_causal, size)
    if has_torch_function(given):
        found: bool = handle_torch_function(detects_causal_mask, given, mask, is_causal, size)
        return found
    return bool(torch_private.detect_is_causal_mask(mask, is_causal, size))


def sequence_length(src: Tensor, batch_first: bool) -> Any:
    """Return the length of the sequences in a tensor."""
    if has_torch_function((src,)):
        return handle_torch_function(sequence_length, (src,), src, batch_first)
    return torch_private.get_seq_len(src, batch_first)


def _itself(input: Any) -> Any:
    return input


def _traced(original: Callable[..., Any], as_node: Callable[..., Any], about: Sequence[str]) -> Any:
    """Return the original, or ``as_node`` in its place when one of the arguments is a proxy."""
    signature = inspect.signature(original)

    def decide(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get(about[0]) is None:  # then the others do not matter
            return original(*args, **kwargs)
        if any(isinstance(given.get(name), Proxy) for name in about):
            return as_node(**given)
        return original(*args, **kwargs)

    return decide


_ABOUT_MASKS: tuple[tuple[Any, Callable[..., Any], Callable[..., Any], Sequence[str]], ...] = (
    (F, torch_private.canonical_mask, canonical_mask, ("mask",)),
    (F, torch_private.none_or_dtype, _itself, ("input",)),
    (transformer, torch_private.detect_is_causal_mask, detects_causal_mask, ("mask", "size")),
    (transformer, torch_private.get_seq_len, sequence_length, ("src",)),
)
"""The functions about masks that a forward calls, and what is recorded in their place for proxies."""
