"""The functions of torch that operators of ATen implement, so that a graph of operators reads like a model.

An operator is what a function of torch calls in the end, with the same arguments in the order of the
operator's schema. Functions that put their arguments in another order, or that are methods or Python's own,
are in the tables here. What has no such function stays an operator.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from biofx.torch_private import OpOverload, arguments_in_schema, name_in_schema, nn_operators

Options = dict[str, Any]
Call = tuple[Any, tuple[Any, ...], Options]
"""What is called (a text is a method), and with which arguments."""
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""Operators that are whole layers, and whose functions no analysis follows."""
_TO_THE_END = 2**63 - 1


def is_aten(node: Node) -> bool:
    """Whether a node calls an operator of ATen."""
    target = node.target
    return node.op == "call_function" and isinstance(target, OpOverload) and target.namespace == "aten"


def become_function(node: Node) -> bool:
    """Let a node that calls an operator call the function that the operator implements.

    Args:
        node: of an operator of ATen; changed in place.

    Returns:
        Whether there is one.
    """
    found = _call_of(node)
    if found is None:
        return False
    target, args, options = found
    node.op = "call_method" if isinstance(target, str) else "call_function"
    node.target, node.args, node.kwargs = target, args, options
    return True


def parts_instead_of_all(node: Node) -> None:
    """Let an operator that returns statistics besides a result be the function that returns the result.

    It is left alone where statistics are read.
    """
    name = _name_of(node)
    if name not in _WITH_STATISTICS:
        return
    parts = list(node.users)
    if any(part.target is not operator.getitem or part.args[1] != 0 for part in parts if part.users):
        return
    given = arguments_of(node)
    if given.get("training", False):
        return
    for part in parts:
        part.replace_all_uses_with(node)
        part.graph.erase_node(part)
    _, node.args, options = _WITH_STATISTICS[name](given)
    node.target, node.kwargs = _, options


def arguments_of(node: Node) -> Options:
    """Return the arguments of a call of an operator, by the names of its schema, with defaults filled in."""
    target: Any = node.target
    given: Options = {}
    for place, argument in enumerate(arguments_in_schema(target)):
        if place < len(node.args):
            given[argument.name] = node.args[place]
        elif argument.name in node.kwargs:
            given[argument.name] = node.kwargs[argument.name]
        else:
            given[argument.name] = argument.default_value
    return given


def _name_of(node: Node) -> str:
    target: Any = node.target
    return name_in_schema(target).partition("::")[2] if is_aten(node) else ""


def _call_of(node: Node) -> Call | None:
    name = _name_of(node)
    if name in _TABLE:
        return _TABLE[name](arguments_of(node))
    for found in (getattr(torch, name, None), getattr(nn_operators, name, None)):
        if callable(found) and type(found).__name__ == "builtin_function_or_method":
            return found, node.args, dict(node.kwargs)
    if callable(getattr(Tensor, name, None)) and node.args and isinstance(node.args[0], Node):
        return name, node.args, dict(node.kwargs)
    return None


# the tables


def _without_none(*given: Any) -> tuple[Any, ...]:
    """Return arguments without those at the end that are None."""
    kept = list(given)
    while kept and kept[-1] is None:
        kept.pop()
    return tuple(kept)


_NEUTRAL = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


def _convolution(function: Callable[..., Tensor], given: Options) -> Call:
    options = {}
    for name, neutral in _NEUTRAL.items():
        value = given.get(name, neutral)
        several = isinstance(value, (list, tuple))
        if any(entry != neutral for entry in (value if several else (value,))):
            options[name] = tuple(value) if several else value
    return function, _without_none(given["input"], given["weight"], given["bias"]), options


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _any_convolution(given: Options) -> Call:
    function = (_TRANSPOSED if given["transposed"] else _CONVOLUTIONS)[len(given["stride"])]
    return _convolution(function, given)


def _batch_norm(given: Options) -> Call:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    return F.batch_norm, tuple(given.get(name, False) for name in names), {}


def _instance_norm(given: Options) -> Call:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    return F.instance_norm, tuple(given[name] for name in names), {}


def _layer_norm(given: Options) -> Call:
    shape = tuple(given["normalized_shape"])
    return F.layer_norm, (given["input"], shape, given["weight"], given["bias"], given["eps"]), {}


def _rms_norm(given: Options) -> Call:
    return F.rms_norm, (given["input"], tuple(given["normalized_shape"]), given["weight"], given["eps"]), {}


def _group_norm(given: Options) -> Call:
    groups = given["num_groups"] if "num_groups" in given else given["group"]
    return F.group_norm, (given["input"], groups, given["weight"], given["bias"], given["eps"]), {}


def _dropout(function: Callable[..., Tensor]) -> Callable[[Options], Call]:
    return lambda given: (function, (given["input"],), {"p": given["p"], "training": given["train"]})


def _feature_dropout(given: Options) -> Call:
    return torch.feature_dropout, (given["input"], given["p"], given["train"]), {}


def _embedding(given: Options) -> Call:
    options = {name: True for name in ("scale_grad_by_freq", "sparse") if given[name]}
    if given["padding_idx"] >= 0:
        options["padding_idx"] = given["padding_idx"]
    return F.embedding, (given["indices"], given["weight"]), options


def _softmax(function: Callable[..., Tensor]) -> Callable[[Options], Call | None]:
    def call(given: Options) -> Call | None:
        if given.get("half_to_float"):
            return None
        options = {} if given.get("dtype") is None else {"dtype": given["dtype"]}
        return function, (given["self"], given["dim"]), options

    return call


def _along(dim: int, entry: Any) -> Any:
    """Return the index that takes an entry or a part along an axis."""
    if dim < 0:
        return (Ellipsis, entry, *[slice(None)] * (-dim - 1))
    return (*[slice(None)] * dim, entry)


def _slice(given: Options) -> Call:
    end = None if given["end"] == _TO_THE_END else given["end"]
    step = None if given["step"] == 1 else given["step"]
    start = None if isinstance(given["start"], int) and given["start"] == 0 else given["start"]
    return operator.getitem, (given["self"], _along(given["dim"], slice(start, end, step))), {}


def _select(given: Options) -> Call:
    return operator.getitem, (given["self"], _along(given["dim"], given["index"])), {}


def _arithmetic(function: Callable[..., Any], name: str) -> Callable[[Options], Call]:
    def call(given: Options) -> Call:
        if given.get("alpha", 1) != 1:
            return getattr(torch, name), (given["self"], given["other"]), {"alpha": given["alpha"]}
        return function, (given["self"], given["other"]), {}

    return call


def _division(given: Options) -> Call:
    if given.get("rounding_mode") is not None:
        options = {"rounding_mode": given["rounding_mode"]}
        return torch.div, (given["self"], given["other"]), options
    return operator.truediv, (given["self"], given["other"]), {}


def _converted(given: Options) -> Call:
    """``_to_copy``: what ``to`` does where something changes."""
    names = ("dtype", "device", "memory_format")
    options = {name: given[name] for name in names if given.get(name) is not None}
    return "to", (given["self"],), {**options, "copy": True}


def _size(given: Options) -> Call:
    return "size", (given["self"], given["dim"]), {}


_TABLE: Mapping[str, Callable[[Options], Call | None]] = {
    "linear": lambda given: (F.linear, _without_none(given["input"], given["weight"], given["bias"]), {}),
    **{f"conv{axes}d": functools.partial(_convolution, _CONVOLUTIONS[axes]) for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": functools.partial(_convolution, _TRANSPOSED[axes]) for axes in (1, 2, 3)},
    "convolution": _any_convolution,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "dropout": _dropout(F.dropout),
    "feature_dropout": _feature_dropout,
    "alpha_dropout": _dropout(F.alpha_dropout),
    "feature_alpha_dropout": _dropout(F.feature_alpha_dropout),
    "embedding": _embedding,
    "softmax": _softmax(torch.softmax),
    "_softmax": _softmax(torch.softmax),
    "log_softmax": _softmax(torch.log_softmax),
    "_log_softmax": _softmax(torch.log_softmax),
    "slice": _slice,
    "select": _select,
    "add": _arithmetic(operator.add, "add"),
    "sub": _arithmetic(operator.sub, "sub"),
    "mul": _arithmetic(operator.mul, "mul"),
    "div": _division,
    "_to_copy": _converted,
    "sym_size": _size,
    **dict.fromkeys(RECURRENT, lambda given: None),
    "einsum": lambda given: (torch.einsum, (given["equation"], *given["tensors"]), {}),
}
_WITH_STATISTICS: Mapping[str, Callable[[Options], Call]] = {
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
}
