"""Operators of rewritten graphs written as operations of torch, for a graph that no longer knows biofx."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from biofx.deploy.plain_masks import write_out_masks
from biofx.operators.norm_ops import affine_synapses, batch_norm, batch_norm_synapses
from biofx.operators.split_ops import full_size, pool_synapses, require_axes, spread_synapses, sum_synapses

Call = Callable[..., Node]
"""Inserts a call of a method (named by a text) or of a function, and returns its node."""


def write_out(own: GraphModule) -> None:
    """Replace sums over synapses, and what folded graphs call, by operations of torch.

    Batch normalisations between folded layers become calls of :func:`biofx.norm_ops.batch_norm`.
    """
    write_out_masks(own)
    for node in list(own.graph.nodes):
        writer = _WRITERS.get(node.target) if node.op == "call_function" else None
        if writer is None:
            continue
        with own.graph.inserting_before(node):
            made = writer(functools.partial(_insert, own.graph, node), node)
        node.replace_all_uses_with(made)
        own.graph.erase_node(node)


def _insert(graph: Graph, like: Node, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    op = "call_method" if isinstance(target, str) else "call_function"
    made = graph.create_node(op, target, args, kwargs)
    made.meta = dict(like.meta)
    return made


def _sum(call: Call, node: Node, *, keepdim: bool = False) -> tuple[Node, Node]:
    axis: Any = node.kwargs["channel_axis"]
    grouped = call(torch.unflatten, node.args[0], axis, [-1, node.kwargs["gamma"]])
    summed = call("sum", grouped, axis, keepdim=True) if keepdim else call("sum", grouped, axis)
    return grouped, summed


def _pool(call: Call, node: Node) -> Node:
    axis: Any = node.kwargs["channel_axis"]
    grouped, summed = _sum(call, node, keepdim=True)
    return call("flatten", call("expand_as", summed, grouped), axis - 1, axis)


def _spread(call: Call, x: Any, *, gamma: Any, channel_axis: Any, groups: Any) -> Node:
    apart = call(torch.unflatten, x, channel_axis, [groups, 1, -1])
    repeated = call("repeat_interleave", apart, gamma, channel_axis - 1)
    return call("flatten", repeated, channel_axis - 2, channel_axis)


def _full_size(call: Call, node: Node) -> Node:
    x, *axis = node.args
    gamma, channel_axis = node.kwargs["gamma"], node.kwargs["channel_axis"]
    repeated = call("repeat_interleave", x, gamma, channel_axis)  # only its size matters
    return call("size", repeated, *axis)


def _require_axes(call: Call, node: Node) -> Node:
    x, count = node.args
    fits = call(operator.eq, call("dim", x), count)
    call(torch._assert, fits, f"expected a tensor with {count} axes (a batch)")
    return x  # type: ignore[return-value]


def _affine(call: Call, node: Node) -> Node:
    x, *entries = node.args
    axis: Any = node.kwargs["channel_axis"]
    made = _spread(call, x, **node.kwargs)
    for operation, values in zip(("mul", "add"), entries, strict=True):
        if isinstance(values, Node):
            laid_out = values
            if axis < -1 and _rank(values) < -axis:
                laid_out = call("reshape", values, [-1, *[1] * (-axis - 1)])
            made = call(operation, made, laid_out)
    return made


def _rank(node: Node) -> int:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return int(value.dim())


def _batch_norm(call: Call, node: Node) -> Node:
    x, mean, variance, count, weight, bias, training = node.args
    options: dict[str, Any] = dict(node.kwargs)
    full = call("repeat_interleave", x, options.pop("gamma"), options.pop("channel_axis"))
    if mean is None:
        options["track_running_stats"] = False
    return call(batch_norm, full, weight, bias, mean, variance, count, training, **options)


_WRITERS: dict[Any, Callable[[Call, Node], Node]] = {
    pool_synapses: _pool,
    sum_synapses: lambda call, node: _sum(call, node)[1],
    spread_synapses: lambda call, node: _spread(call, node.args[0], **node.kwargs),
    full_size: _full_size,
    require_axes: _require_axes,
    affine_synapses: _affine,
    batch_norm_synapses: _batch_norm,
}
