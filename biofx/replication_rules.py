"""What each operation makes of values that repeat each channel: one rule an operation.

A rule is given a call with compact inputs. It returns the replication of the result, or raises
:class:`ReplicationEnds` with the reason why the operation needs the members apart. Rules for normalisation
are in :mod:`biofx.replication_norms`, that of layers with weights in :mod:`biofx.folding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from biofx import fold_ops, guards, ops
from biofx.dataflow import short_name
from biofx.replication import Call, Outcome, Replication, ReplicationEnds, Rule
from biofx.replication_norms import NORM_RULES


def rule_for(node: Node, graph_module: GraphModule) -> tuple[str, Rule | None]:
    """Return what a node's operation is called, and its rule; None for an operation without one."""
    name = short_name(node, graph_module)
    if node.op == "call_function" and node.target in _OWN_RULES:
        return name, _OWN_RULES[node.target]
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        known = type(module).__module__.startswith("torch.nn.modules") and "forward" not in vars(module)
    elif node.op == "call_function":
        home = getattr(node.target, "__module__", None) or "torch"
        known = node.target is getattr or home.split(".")[0] in ("torch", "_operator")
    else:
        known = node.op == "call_method"
    return name, _RULES.get(name) if known else None


def works_by_element(node: Node, graph_module: GraphModule) -> bool:
    """Whether an operation is known to act on each element by itself."""
    return rule_for(node, graph_module)[1] in (_elementwise, _unary)


def _elementwise(call: Call) -> Outcome:
    """Each channel is computed alike from itself, from equal replications, and from what all share."""
    replications = list(call.inputs.values())
    first = replications[0]
    for other in replications[1:]:
        if not first.matches(other):
            raise ReplicationEnds("its inputs repeat their channels differently")
    for node in call.node.all_input_nodes:
        if node not in call.inputs and not _is_shared(call, node, first):
            raise ReplicationEnds(f"{node.name} has an entry of its own for each channel, or may have")
    ranks = {replication.rank for replication in replications}
    sure = any(replication.rank_is_sure for replication in replications)
    return Outcome(
        dataclasses.replace(first, rank=first.rank if len(ranks) == 1 else None, rank_is_sure=sure)
    )


def _is_shared(call: Call, node: Node, replication: Replication) -> bool:
    """Whether a parameter or buffer has one entry, or none, along the channels."""
    constant = call.constant(node)
    if constant is None or constant.dim() > (replication.rank or constant.dim()):
        return False
    return constant.dim() < -replication.axis or constant.shape[replication.axis] == 1


def _unary(call: Call) -> Outcome:
    """Element by element, from one tensor."""
    if len(call.node.all_input_nodes) != 1:
        raise ReplicationEnds("an option of it is known only when it runs")
    return Outcome(call.source)


def _prelu(call: Call) -> Outcome:
    """Its slopes may be one for each channel."""
    if not isinstance(call.module, nn.PReLU) or call.module.weight.numel() != 1:
        raise ReplicationEnds("it has a slope for each channel")
    return Outcome(call.source)


def _dropout(call: Call) -> Outcome:
    """In training each member is dropped by itself."""
    training = call.option("training", 2, True)
    if call.option("p", 1, 0.5) == 0 or (call.module is None and training is False):
        return Outcome(call.source)
    raise ReplicationEnds("in training mode it draws a mask for each channel")


def _over_last_axes(count: int) -> Rule:
    """Pools over the last ``count`` axes, each channel by itself."""

    def rule(call: Call) -> Outcome:
        source = call.source
        if call.option("return_indices", 6, False):
            raise ReplicationEnds("it returns indices too")
        _leave_channels_alone(source, count)
        return Outcome(source)

    return rule


def _leave_channels_alone(source: Replication, count: int) -> None:
    if -source.axis <= count:
        raise ReplicationEnds("it acts along the channels")


def _pad(call: Call) -> Outcome:
    """Pads the last axes, two numbers for each."""
    padding = call.fixed("padding" if call.module is not None else "pad", 1)
    source = call.source
    _leave_channels_alone(source, len(padding) // 2 if isinstance(padding, (tuple, list)) else 1)
    return Outcome(source)


def _resample(call: Call) -> Outcome:
    """Resamples everything behind the axis of the channels."""
    source = call.source
    if len(call.node.all_input_nodes) != 1:
        raise ReplicationEnds("an option of it is known only when it runs")
    if source.axis != 1 - call.rank(source):
        raise ReplicationEnds("it acts along the channels")
    return Outcome(source)


def _flatten(call: Call) -> Outcome:
    """Merges axes; channels stay together where theirs is the first to be merged."""
    source = call.source
    at_module = call.module is not None
    start = call.from_end(call.fixed("start_dim", 1, 1 if at_module else 0), source)
    end = call.from_end(call.fixed("end_dim", 2, -1), source)
    if start < source.axis <= end:
        raise ReplicationEnds("it merges the channels into axes before them")
    rank = None if source.rank is None else source.rank - (end - start)
    if source.axis == start:
        return Outcome(dataclasses.replace(source, axis=end, rank=rank, inner=source.inner or end > start))
    axis = source.axis + (end - start) if source.axis < start else source.axis
    return Outcome(dataclasses.replace(source, axis=axis, rank=rank))


def _view(call: Call) -> Outcome:
    """``x.view(x.size(0), -1)`` flattens all but the batch; other shapes are not looked into."""
    sizes = call.node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    first = call.node.args[0]
    if (
        len(sizes) != 2
        or sizes[1] != -1
        or not isinstance(first, Node)
        or not _is_batch_size(sizes[0], first)
    ):
        raise ReplicationEnds("it gives sizes that are not known to keep channels together; use flatten(1)")
    source = call.inputs.get(first)
    if source is None or source.axis != 1 - call.rank(source):
        raise ReplicationEnds("it merges the channels into axes before them")
    return Outcome(dataclasses.replace(source, axis=-1, rank=2, inner=source.inner or source.axis != -1))


def _is_batch_size(size: Any, x: Node) -> bool:
    """Whether ``size`` is ``x.size(0)`` or ``x.shape[0]``."""
    if not isinstance(size, Node):
        return False
    if size.op == "call_method" and size.target == "size":
        return size.args == (x, 0)
    shape = size.args[0] if size.args else None
    return (
        size.args[1:] == (0,)
        and isinstance(shape, Node)
        and short_name(size, _owner(size)) == "getitem"
        and (shape.args == (x, "shape") or (shape.op == "call_method" and shape.args == (x,)))
    )


def _owner(node: Node) -> GraphModule:
    owner = node.graph.owning_module
    if owner is None:
        raise ReplicationEnds("its graph has no module")
    return owner


def _reduce(call: Call) -> Outcome:
    """Sums, means and extremes over other axes than the channels'."""
    source = call.source
    axes = call.fixed("dim", 1)
    if axes is None:
        raise ReplicationEnds("it acts along the channels")
    listed: Iterable[Any] = axes if isinstance(axes, (tuple, list)) else (axes,)
    reduced = {call.from_end(axis, source) for axis in listed}
    if source.axis in reduced or not reduced:
        raise ReplicationEnds("it acts along the channels")
    if call.fixed("keepdim", 2, False):
        return Outcome(source)
    axis = source.axis + sum(axis > source.axis for axis in reduced)
    rank = None if source.rank is None else source.rank - len(reduced)
    return Outcome(dataclasses.replace(source, axis=axis, rank=rank))


def _cat(call: Call) -> Outcome:
    """Joins equal replications: along the channels there are then more connections."""
    tensors = call.option("tensors", 0)
    if not isinstance(tensors, (tuple, list)) or any(tensor not in call.inputs for tensor in tensors):
        raise ReplicationEnds("not all that it joins repeat their channels")
    pieces = [call.inputs[tensor] for tensor in tensors]
    first = pieces[0]
    if len({(piece.axis, piece.gamma, piece.inner, piece.rank) for piece in pieces}) > 1:
        raise ReplicationEnds("its inputs repeat their channels differently")
    axis = call.from_end(call.fixed("dim", 1, call.fixed("axis", 1, 0)), first)
    if axis != first.axis:
        if any(piece.groups != first.groups for piece in pieces):
            raise ReplicationEnds("its inputs repeat their channels differently")
        return Outcome(first)
    if first.inner:
        raise ReplicationEnds("its inputs hold several values for each channel")
    return Outcome(dataclasses.replace(first, groups=sum(piece.groups for piece in pieces)))


def _size(call: Call) -> Outcome:
    """Asks how large the tensor is; the answer is that of the full one."""
    if call.name == "getattr" and call.option("name", 1) not in ("shape", *_SAME_FOR_COMPACT):
        raise ReplicationEnds(f"it asks for its {call.option('name', 1)}")
    source = call.source
    if call.name == "getattr" and call.option("name", 1) != "shape":
        return Outcome(None)

    def ask_for_full_size(folding: Any) -> None:
        node = call.node
        axis = None if call.name == "getattr" else call.option("dim", 1)
        node.op, node.target = "call_function", fold_ops.full_size
        node.args = (node.args[0],) if axis is None else (node.args[0], axis)
        node.kwargs = {"gamma": source.gamma, "channel_axis": source.axis}

    return Outcome(None, ask_for_full_size, message="answers with the size of all members")


_SAME_FOR_COMPACT = ("device", "dtype", "ndim", "is_cuda", "requires_grad")


def _same_answer(call: Call) -> Outcome:
    """Asks something that is the same for the compact tensor."""
    return Outcome(None)


def _observe(call: Call) -> Outcome:
    """Members of a connection are equally active."""
    source = call.source
    if source.inner or call.node.kwargs.get("channel_axis") != source.axis:
        raise ReplicationEnds("it observes along another axis")

    def observe_for_members(folding: Any) -> None:
        call.node.kwargs = {**call.node.kwargs, "gamma": source.gamma}

    return Outcome(source, observe_for_members, message="observes one value for all members")


_UNARY = (
    *("relu", "relu6", "leakyrelu", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid"),
    *("tanh", "hardtanh", "hardsigmoid", "hardswish", "softplus", "softsign", "logsigmoid", "tanhshrink"),
    *(
        "hardshrink",
        "softshrink",
        "threshold",
        "identity",
        "contiguous",
        "clone",
        "detach",
        "float",
        "double",
    ),
    *(
        "half",
        "bfloat16",
        "abs",
        "neg",
        "negative",
        "exp",
        "log",
        "log1p",
        "expm1",
        "sqrt",
        "rsqrt",
        "square",
    ),
    *("sin", "cos", "erf", "sign", "reciprocal", "floor", "ceil", "round", "clamp_min", "clamp_max"),
)
_POINTWISE = (
    *("add", "sub", "mul", "div", "truediv", "true_divide", "maximum", "minimum", "pow", "clamp", "lerp"),
    *("iadd", "isub", "imul", "itruediv", "multiply", "subtract", "divide", "addcmul"),
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_POINTWISE, _elementwise),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout"), _dropout),
    **dict.fromkeys(("alpha_dropout", "feature_dropout", "featurealphadropout"), _dropout),
    **{
        f"{prefix}{separator}pool{axes}d": _over_last_axes(axes)
        for axes in (1, 2, 3)
        for prefix, separator in (
            *(("max", ""), ("max", "_"), ("avg", ""), ("avg", "_"), ("lp", ""), ("lp", "_")),
            *(("adaptiveavg", ""), ("adaptive_avg", "_"), ("adaptivemax", ""), ("adaptive_max", "_")),
        )
    },
    **{
        f"{mode}pad{axes}d": _pad
        for mode in ("zero", "constant", "reflection", "replication", "circular")
        for axes in (1, 2, 3)
    },
    "pad": _pad,
    "interpolate": _resample,
    "upsample": _resample,
    "upsamplingnearest2d": _resample,
    "upsamplingbilinear2d": _resample,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
    "prelu": _prelu,
    "cat": _cat,
    "concat": _cat,
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    "size": _size,
    "getattr": _size,
    "dim": _same_answer,
    "ndimension": _same_answer,
    "is_floating_point": _same_answer,
    **NORM_RULES,
}
_OWN_RULES: dict[Any, Rule] = {ops.observe_activity: _observe, guards.require_tensor: _same_answer}
