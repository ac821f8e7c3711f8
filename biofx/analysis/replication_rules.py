"""What each operation makes of values that repeat each channel: one rule an operation.

A rule is given a call with compact inputs. It returns the replication of the result, or raises
:class:`ReplicationEnds` with the reason why the operation needs the members apart. Rules for normalisation
are in :mod:`biofx.replication_norms`, those for what changes shapes in :mod:`biofx.replication_shapes`, that
of layers with weights in :mod:`biofx.rewriting.folding`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from biofx.analysis.dataflow import short_name
from biofx.analysis.replication import Call, Outcome, Replication, ReplicationEnds, Rule
from biofx.analysis.replication_norms import NORM_RULES, lowered_batch_norm
from biofx.analysis.replication_shapes import SHAPE_RULES
from biofx.graph import guards
from biofx.operators.norm_ops import batch_norm
from biofx.operators.rate_ops import observe_activity


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
    for node in call.tensors:
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
    if len(call.tensors) != 1:
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
    if len(call.tensors) != 1:
        raise ReplicationEnds("an option of it is known only when it runs")
    if source.axis != 1 - call.rank(source):
        raise ReplicationEnds("it acts along the channels")
    return Outcome(source)


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
    "prelu": _prelu,
    "upsamplingnearest2d": _resample,
    "upsamplingbilinear2d": _resample,
    "dim": _same_answer,
    "ndimension": _same_answer,
    "is_floating_point": _same_answer,
    **SHAPE_RULES,
    **NORM_RULES,
}
_OWN_RULES: dict[Any, Rule] = {
    observe_activity: _observe,
    guards.require_tensor: _same_answer,
    batch_norm: lowered_batch_norm,
}
