"""What operations that change or ask for shapes make of values that repeat each channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch.fx import GraphModule, Node

from biofx.analysis.dataflow import short_name
from biofx.analysis.replication import Call, Outcome, ReplicationEnds, Rule
from biofx.operators.split_ops import full_size


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
        node.op, node.target = "call_function", full_size
        node.args = (node.args[0],) if axis is None else (node.args[0], axis)
        node.kwargs = {"gamma": source.gamma, "channel_axis": source.axis}

    return Outcome(None, ask_for_full_size, message="answers with the size of all members")


_SAME_FOR_COMPACT = ("device", "dtype", "ndim", "is_cuda", "requires_grad")


SHAPE_RULES: dict[str, Rule] = {
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
    "cat": _cat,
    "concat": _cat,
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    "size": _size,
    "getattr": _size,
}
