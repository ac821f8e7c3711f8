"""Functions of biofx, and values known before a model is deployed, written as operations of torch.

Loading a ``torch.fx.GraphModule`` traces its code again. So a plain graph must not ask in Python what torch
answers by looking at types and values, nor hand a size of the input to a tensor of the model.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from biofx.errors import PassError
from biofx.layers.attention import canonical_mask, detects_causal_mask, sequence_length
from biofx.model.graph_places import module_at
from biofx.operators.norm_ops import affine_synapses, batch_norm, batch_norm_synapses
from biofx.operators.split_ops import full_size, pool_synapses, require_axes, spread_synapses, sum_synapses
from biofx.torch_private import assert_in_graph

Call = Callable[..., Node]
"""Inserts a call of a method (named by a text) or of a function, and returns its node."""


def write_out(own: GraphModule) -> None:
    """Replace what only biofx can call by operations of torch.

    Batch normalisations between folded layers become calls of :func:`biofx.operators.norm_ops.batch_norm`.

    Raises:
        PassError: whether a mask is the causal one is known only when the model runs.
    """
    writers: dict[Any, Callable[[Call, Node], Any]] = {**_WRITERS}
    writers[canonical_mask] = functools.partial(_canonical_mask, set())
    on_load = computed_on_load(own)
    for node in list(own.graph.nodes):
        writer = writers.get(node.target) if node.op == "call_function" else None
        if writer is None or (writer is _slice and not _is_tensor_in(on_load, node.args[0])):
            continue
        with own.graph.inserting_before(node):
            made = writer(functools.partial(_insert, own.graph, node), node)
        if made is not node:
            replace_with(node, made)
    for node in reversed(own.graph.nodes):
        if node.target is sequence_length and not node.users:
            own.graph.erase_node(node)


def replace_with(node: Node, value: Any) -> None:
    """Put another node or a constant where a node is used, and erase the node."""

    def replaced(source: Node) -> Any:
        return value if source is node else source

    for user in list(node.users):
        user.args, user.kwargs = map_arg(user.args, replaced), map_arg(user.kwargs, replaced)
    node.graph.erase_node(node)


def replace_settings(graph_module: GraphModule) -> None:
    """Replace reads of numbers and flags that modules hold by their present values; training is False."""
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
        elif node.target is getattr and isinstance(node.args[0], Node) and node.args[0].op == "get_attr":
            owner, name = str(node.args[0].target), str(node.args[1])
        else:
            continue
        module = module_at(graph_module, owner)
        held = {} if module is None else vars(module)
        if name in held and isinstance(held[name], (int, float, type(None))):
            replace_with(node, False if name == "training" else held[name])


def computed_on_load(own: GraphModule) -> set[Node]:
    """Return the nodes that torch computes once when it loads a graph module, which traces it again.

    They depend neither on an input nor on a parameter.
    """
    found: set[Node] = set()
    for node in own.graph.nodes:
        if node.op == "get_attr":
            is_computed = not isinstance(_value(node), nn.Parameter)
        else:
            is_call = node.op in ("call_function", "call_method")
            is_computed = is_call and all(source in found for source in node.all_input_nodes)
        if is_computed:
            found.add(node)
    return found


def _is_tensor_in(nodes: set[Node], node: Any) -> bool:
    if node not in nodes:
        return False
    return isinstance(_value(node), Tensor) if node.op == "get_attr" else node.target not in (getattr, "size")


def _value(node: Node) -> Any:
    """Return what a node reads from the graph's module."""
    own: Any = node.graph.owning_module
    owner, _, name = str(node.target).rpartition(".")
    return getattr(own.get_submodule(owner), name)


def _insert(graph: Graph, like: Node, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    op = "call_method" if isinstance(target, str) else "call_function"
    made = graph.create_node(op, target, args, kwargs)
    made.meta = dict(like.meta)
    return made


def _detects_causal_mask(call: Call, node: Node) -> bool:
    """Whether a mask is the causal one decides only who applies it, attention's kernel or an addition.

    The mask is there, so the answer is no. Where the caller says that it is, that is believed, as by torch.
    """
    given = node.kwargs.get("is_causal", node.args[1] if len(node.args) > 1 else None)
    if isinstance(given, Node):
        raise PassError(
            f"{node.name!r}: whether the mask is causal is known only when the model runs, and a plain graph "
            "cannot depend on it; deploy a model that gives is_causal as a constant, or not at all"
        )
    return given is True


def _canonical_mask(ready: set[Node], call: Call, node: Node) -> Node:
    """Leave a mask to be added as it is, and turn flags into 0 and minus infinity."""
    mask: Any = node.args[0]
    target_type = node.args[4] if len(node.args) > 4 else node.kwargs["target_type"]
    if mask in ready:  # by the stack that the layer is in
        made = call("to", mask, target_type)
    else:
        has_flags = call(operator.eq, call("is_floating_point", mask), False)
        blocked = call(operator.mul, call("to", mask, torch.bool), has_flags)  # a number, for TorchScript
        cast = call("to", mask, target_type)
        made = call("masked_fill", cast, call("to", blocked, torch.bool), -math.inf)
    ready.add(made)
    return made


def _slice(call: Call, node: Node) -> Node:
    """Slice a tensor of the model by sizes of the input with an operator: Python's syntax needs numbers.

    An index with nodes besides is left alone; a mask among them takes any number of axes.
    """
    made, index = node.args
    entries: list[Any] = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(isinstance(entry, Node) for entry in entries):
        return node
    counted = [place for place, entry in enumerate(entries) if entry is not None]
    for place, entry in enumerate(entries):
        if not isinstance(entry, slice):
            continue
        start, stop, step = entry.start, entry.stop, entry.step
        if not any(isinstance(bound, Node) for bound in (start, stop, step)):
            continue
        axis = counted.index(place)
        if ... in entries[:place]:
            axis -= len(counted)
        made = call(torch.ops.aten.slice.Tensor, made, axis, start, stop, 1 if step is None else step)
        entries[place] = slice(None)
    if made is node.args[0]:
        return node
    if all(entry is ... or entry == slice(None) for entry in entries):
        return made  # type: ignore[return-value]
    return call(operator.getitem, made, tuple(entries))


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
    call(assert_in_graph, fits, f"expected a tensor with {count} axes (a batch)")
    return x  # type: ignore[return-value]


def _affine(call: Call, node: Node) -> Node:
    x, *entries = node.args
    axis: Any = node.kwargs["channel_axis"]
    made = _spread(call, x, **node.kwargs)
    for operation, values in zip(("mul", "add"), entries, strict=True):
        if isinstance(values, Node):
            laid_out, held = values, _value(values)
            if axis < -1 and held.dim() < -axis:
                laid_out = call("reshape", values, [-1, *[1] * (-axis - 1)])
            made = call(operation, made, laid_out)
    return made


def _batch_norm(call: Call, node: Node) -> Node:
    x, mean, variance, count, weight, bias, training = node.args
    options: dict[str, Any] = dict(node.kwargs)
    full = call("repeat_interleave", x, options.pop("gamma"), options.pop("channel_axis"))
    if mean is None:
        options["track_running_stats"] = False
    return call(batch_norm, full, weight, bias, mean, variance, count, training, **options)


_WRITERS: dict[Any, Callable[[Call, Node], Any]] = {
    detects_causal_mask: _detects_causal_mask,
    operator.getitem: _slice,
    pool_synapses: _pool,
    sum_synapses: lambda call, node: _sum(call, node)[1],
    spread_synapses: lambda call, node: _spread(call, node.args[0], **node.kwargs),
    full_size: _full_size,
    require_axes: _require_axes,
    affine_synapses: _affine,
    batch_norm_synapses: _batch_norm,
}
