"""Operations that move entries about: flatten, reshape, permute, expand, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from biofx.analysis.forward import CannotFollow, declare
from biofx.analysis.layout import Size, reshaped_layout
from biofx.analysis.replication import Outcome, ReplicationCall
from biofx.analysis.synapses import short_name
from biofx.analysis.units import UnitCall, UnitValue, observed_only

# units


def flattened(call: UnitCall) -> UnitValue:
    """``flatten``: a unit takes up a run of the axis that its own becomes."""
    if call.layout is None:
        return call.moves_unknown()
    first = call.position(call.option(1, "start_dim", 0))
    last = call.position(call.option(2, "end_dim", -1))
    return call.keeps(rank=_plus(call, first - last), layout=call.layout.flattened(first, last))


def unflattened(call: UnitCall) -> UnitValue:
    """``unflatten``: an axis taken apart."""
    if call.layout is None:
        return call.moves_unknown()
    position = call.position(call.option(1, "dim"))
    sizes = call.option(2, "unflattened_size", call.argument(2, "sizes"))
    given = [None if size == -1 else size for size in call.numbers(sizes)]
    return call.keeps(rank=_plus(call, len(given) - 1), layout=call.layout.unflattened(position, given))


def reshaped(call: UnitCall) -> UnitValue:
    """``reshape``, ``view``: axes merged and taken apart."""
    layout = call.layout
    whole = call.value(call.argument(1, "shape"))
    if whole.tail is not None:  # as many axes in front as some other value has
        if layout is None:
            return call.moves_unknown()
        last = [_size(size) for size in whole.tail]
        return call.keeps(rank=None, layout=reshaped_layout(layout, None, last))
    sizes = whole.parts or tuple(call.value(size) for size in call.listed(1, "shape"))
    if layout is None:
        return call.moves_unknown(rank=len(sizes))
    if len(sizes) == 1 and sizes[0].number is None and sizes[0].size_of is None:
        raise CannotFollow("it reshapes to sizes that are computed in the graph")
    given = [_size(size) for size in sizes]
    return call.keeps(rank=len(given), layout=reshaped_layout(layout, call.x.rank, given))


def _size(value: UnitValue) -> Size:
    return Size(axes=value.size_of) if value.number in (None, -1) else Size(value.number)


def permuted(call: UnitCall) -> UnitValue:
    """``permute``: axes in another order."""
    order = call.numbers(call.listed(1, "dims"))
    rank = len(order)
    if call.layout is None:
        return call.moves_unknown(rank=rank)
    places = {}
    for place, axis in enumerate(order):
        if axis is None:
            raise CannotFollow("an axis is computed in the graph")
        places[axis if axis < 0 else axis - rank] = place - rank
    return call.keeps(rank=rank, layout=call.layout.moved(places))


def transposed(call: UnitCall) -> UnitValue:
    """``transpose``: two axes exchanged."""
    if call.layout is None:
        return call.moves_unknown()
    first, second = call.position(call.argument(1, "dim0")), call.position(call.argument(2, "dim1"))
    return call.keeps(layout=call.layout.moved({first: second, second: first}))


def axis_inserted(call: UnitCall) -> UnitValue:
    """``unsqueeze``."""
    if call.layout is None:
        return call.moves_unknown()
    position = call.position(call.argument(1, "dim"), added=1)
    return call.keeps(rank=_plus(call, 1), layout=call.layout.shifted(position, -1))


def axis_removed(call: UnitCall) -> UnitValue:
    """``squeeze`` of a given axis."""
    if call.layout is None:
        return call.moves_unknown()
    axes = call.argument(1, "dim")
    if axes is None:
        raise CannotFollow("it removes whatever axes happen to have size 1; name the axis")
    return _without(call, axes)


def _without(call: UnitCall, axes: Any) -> UnitValue:
    """Return the value without some axes, none of which has units."""
    layout = call.layout
    if layout is None:
        return call.moves_unknown()
    positions = sorted(call.positions(axes))
    if any(layout.axis_at(position) is not None for position in positions):
        raise CannotFollow("it removes the axis of the units")
    for position in positions:
        layout = layout.shifted(position - 1, 1)
    return call.keeps(rank=_plus(call, -len(positions)), layout=layout)


def _plus(call: UnitCall, axes: int) -> int | None:
    """Return the number of axes with so many more, None where it is not known."""
    return None if call.x.rank is None else call.x.rank + axes


def reduced(call: UnitCall) -> UnitValue:
    """``mean``, ``sum``, ``amax``: over axes without units, each unit by itself."""
    if call.layout is None:
        return call.moves_unknown(nonnegative=call.x.nonnegative)
    axes = call.argument(1, "dim", call.node.kwargs.get("axis"))
    if axes is None:
        return call.ends("it reduces all axes, and mixes the units")
    kept = call.argument(2, "keepdim", False)
    if any(call.layout.axis_at(position) is not None for position in call.positions(axes)):
        mixed = call.ends("it mixes the units" if kept else "it removes the axis of the units")
        return (
            mixed.replace(is_statistic=True, nonnegative=call.x.nonnegative)
            if call.analysis.is_observed
            else mixed
        )
    return call.keeps() if kept else _without(call, axes)


@observed_only
def spread(call: UnitCall) -> UnitValue:
    """``norm``, ``var``, ``std``: over all units a number that is not negative."""
    return call.ends("it mixes the units").replace(is_statistic=True, nonnegative=True)


def _elsewhere(call: UnitCall, axes: Any, reason: str) -> UnitValue:
    """Leave every unit where it is, unless some axes are those of the units."""
    layout = call.layout
    if layout is not None and any(layout.axis_at(position) for position in call.positions(axes)):
        raise CannotFollow(reason)
    return call.keeps()


def expanded(call: UnitCall) -> UnitValue:
    """``expand``: axes without units repeated."""
    sizes = call.listed(1, "size")
    layout = call.layout
    if layout is None:
        return call.moves_unknown(rank=len(sizes))
    for axis in layout.axes:
        if call.value(sizes[axis.position]).number not in (-1, layout.size_at(axis.position)):
            raise CannotFollow("it expands the axis of the units")
    return call.keeps(rank=len(sizes))


def repeated(call: UnitCall) -> UnitValue:
    """``repeat``: axes without units."""
    counts = call.numbers(call.listed(1, "repeats"))
    if call.layout is None:
        return call.moves_unknown(rank=len(counts))
    for axis in call.layout.axes:
        if -axis.position <= len(counts) and counts[axis.position] != 1:
            raise CannotFollow("it repeats the axis of the units")
    return call.keeps(rank=len(counts))


def rolled(call: UnitCall) -> UnitValue:
    """``roll``, ``flip``: along axes without units."""
    if call.layout is None:
        return call.moves_unknown()
    axes = call.argument(1 if "flip" in call.name else 2, "dims")
    if axes is None:
        raise CannotFollow("it moves entries along all axes")
    return _elsewhere(call, axes, "it moves entries along the axis of the units")


# replication


def _flatten(call: ReplicationCall) -> Outcome:
    """Channels stay together where theirs is the first axis to be merged."""
    source = call.source
    start = call.from_end(call.fixed(1, "start_dim", 0 if call.module is None else 1), source)
    end = call.from_end(call.fixed(2, "end_dim", -1), source)
    if start < source.axis <= end:
        raise CannotFollow("it merges the channels into axes before them")
    rank = None if source.rank is None else source.rank - (end - start)
    if source.axis == start:
        return Outcome(source.replace(axis=end, rank=rank, inner=source.inner or end > start))
    axis = source.axis + (end - start) if source.axis < start else source.axis
    return Outcome(source.replace(axis=axis, rank=rank))


def _view(call: ReplicationCall) -> Outcome:
    """``x.view(x.size(0), -1)`` flattens all but the batch; other shapes are not looked into."""
    sizes = call.listed(1, "size")
    if len(sizes) != 2 or sizes[1] != -1 or not _is_batch_size(call, sizes[0]):
        raise CannotFollow("it gives sizes that are not known to keep channels together; use flatten(1)")
    source = call.inputs.get(call.first)
    if source is None or source.axis != 1 - call.rank(source):
        raise CannotFollow("it merges the channels into axes before them")
    return Outcome(source.replace(axis=-1, rank=2, inner=source.inner or source.axis != -1))


def _is_batch_size(call: ReplicationCall, size: Any) -> bool:
    """Whether ``size`` is ``x.size(0)`` or ``x.shape[0]`` of the first argument."""
    x = call.first
    if not isinstance(size, Node) or not isinstance(x, Node):
        return False
    if size.op == "call_method" and size.target == "size":
        return size.args == (x, 0)
    shape = size.args[0] if size.args else None
    return (
        size.args[1:] == (0,)
        and isinstance(shape, Node)
        and short_name(size, call.analysis.graph_module) == "getitem"
        and (shape.args == (x, "shape") or (shape.op == "call_method" and shape.args == (x,)))
    )


def _reduce(call: ReplicationCall) -> Outcome:
    """Sums, means and extremes over other axes than the channels'."""
    source = call.source
    axes = call.fixed(1, "dim")
    listed = axes if isinstance(axes, (tuple, list)) else () if axes is None else (axes,)
    positions = {call.from_end(axis, source) for axis in listed}
    if source.axis in positions or not positions:
        raise CannotFollow("it acts along the channels")
    if call.fixed(2, "keepdim", False):
        return Outcome(source)
    axis = source.axis + sum(position > source.axis for position in positions)
    rank = None if source.rank is None else source.rank - len(positions)
    return Outcome(source.replace(axis=axis, rank=rank))


# what rules an operation has

declare("flatten", units=flattened, replication=_flatten)
declare("unflatten", units=unflattened)
declare("reshape", "view", units=reshaped, replication=_view)
declare("permute", units=permuted)
declare("transpose", "swapaxes", "swapdims", units=transposed)
declare("unsqueeze", units=axis_inserted)
declare("squeeze", units=axis_removed)
declare("mean", "sum", "amax", "amin", units=reduced, replication=_reduce)
declare("norm", "var", "std", torch.linalg.vector_norm, units=spread)
declare("expand", units=expanded)
declare("repeat", units=repeated)
declare("roll", "flip", units=rolled)
