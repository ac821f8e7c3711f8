"""Operations that move entries about: flatten, reshape, permute, expand, reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from biofx.analysis.flow import RULES, Call, Flow
from biofx.analysis.layout import LayoutError
from biofx.analysis.reshaping import Size, reshaped_layout
from biofx.analysis.rules_elementwise import declare


def flattened(call: Call) -> Flow:
    """``flatten``: a unit takes up a run of what its axis becomes."""
    flow = call.x
    if flow.layout is None:
        return call.moves_unknown()
    module = call.module
    start = module.start_dim if module is not None else call.argument(1, "start_dim", 0)
    end = module.end_dim if module is not None else call.argument(2, "end_dim", -1)
    first, last = call.position(start), call.position(end)
    rank = None if flow.rank is None else flow.rank - (last - first)
    return call.keeps(rank=rank).replace(layout=flow.layout.flattened(first, last))


def unflattened(call: Call) -> Flow:
    """``unflatten``: an axis taken apart."""
    if call.x.layout is None:
        return call.moves_unknown()
    module = call.module
    axis = module.dim if module is not None else call.argument(1, "dim")
    sizes = module.unflattened_size if module is not None else call.argument(2, "sizes")
    position = call.position(axis)
    given = [None if size == -1 else size for size in call.numbers(sizes)]
    rank = None if call.x.rank is None else call.x.rank + len(given) - 1
    return call.keeps(rank=rank).replace(layout=call.x.layout.unflattened(position, given))


def reshaped(call: Call) -> Flow:
    """``reshape``, ``view``: axes merged and taken apart."""
    whole = call.flow(call.argument(1, "shape"))
    if whole.tail is not None:  # as many axes in front as some other value has
        if call.x.layout is None:
            return call.moves_unknown()
        last = [_size(size) for size in whole.tail]
        return call.keeps(rank=None).replace(layout=reshaped_layout(call.x.layout, None, last))
    sizes = whole.parts or tuple(call.flow(size) for size in _listed(call, 1, "shape"))
    if call.x.layout is None:
        return call.moves_unknown(rank=len(sizes))
    if len(sizes) == 1 and sizes[0].number is None and sizes[0].size_of is None:
        raise LayoutError("it reshapes to sizes that are computed in the graph")
    given = [_size(size) for size in sizes]
    return call.keeps(rank=len(given)).replace(layout=reshaped_layout(call.x.layout, call.x.rank, given))


def _size(flow: Flow) -> Size:
    return Size(axes=flow.size_of) if flow.number in (None, -1) else Size(flow.number)


def permuted(call: Call) -> Flow:
    """``permute``: axes in another order."""
    order = call.numbers(_listed(call, 1, "dims"))
    if call.x.layout is None:
        return call.moves_unknown(rank=len(order))
    if None in order:
        raise LayoutError("an axis is computed in the graph")
    rank = len(order)
    places = {
        (axis if axis < 0 else axis - rank): place - rank
        for place, axis in enumerate(order)
        if axis is not None
    }
    return call.keeps(rank=rank).replace(layout=call.x.layout.moved(places))


def transposed(call: Call) -> Flow:
    """``transpose``: two axes exchanged."""
    if call.x.layout is None:
        return call.moves_unknown()
    first, second = (call.position(call.argument(place, name)) for place, name in ((1, "dim0"), (2, "dim1")))
    return call.keeps().replace(layout=call.x.layout.moved({first: second, second: first}))


def axis_inserted(call: Call) -> Flow:
    """``unsqueeze``."""
    if call.x.layout is None:
        return call.moves_unknown()
    position = call.position(call.argument(1, "dim"), added=1)
    rank = None if call.x.rank is None else call.x.rank + 1
    return call.keeps(rank=rank).replace(layout=call.x.layout.shifted(position, -1))


def axis_removed(call: Call) -> Flow:
    """``squeeze`` of a given axis."""
    if call.x.layout is None:
        return call.moves_unknown()
    axes = call.argument(1, "dim")
    if axes is None:
        raise LayoutError("it removes whatever axes happen to have size 1; name the axis")
    return _without(call, axes)


def _without(call: Call, axes: Any) -> Flow:
    """Return the flow without some axes, none of which has units."""
    layout = call.x.layout
    given = axes if isinstance(axes, (list, tuple)) else [axes]
    if layout is None:
        return call.moves_unknown()
    positions = sorted(call.position(axis) for axis in given)
    for position in positions:
        if layout.axis_at(position) is not None:
            raise LayoutError("it removes the axis of the units")
    for position in positions:
        layout = layout.shifted(position - 1, 1)
    rank = None if call.x.rank is None else call.x.rank - len(positions)
    return call.keeps(rank=rank).replace(layout=layout)


def reduced(call: Call) -> Flow:
    """``mean``, ``sum``, ``amax``: over axes without units, each unit by itself."""
    if call.x.layout is None:
        return call.moves_unknown(nonnegative=call.x.nonnegative)
    axes = call.argument(1, "dim", call.node.kwargs.get("axis"))
    if axes is None:
        return call.ends("it reduces all axes, and mixes the units")
    keep = call.argument(2, "keepdim", False)
    if not keep:
        return _without(call, axes)
    given = axes if isinstance(axes, (list, tuple)) else [axes]
    if any(call.x.layout.axis_at(call.position(axis)) is not None for axis in given):
        raise LayoutError("it mixes the units")
    return call.keeps()


def expanded(call: Call) -> Flow:
    """``expand``: axes without units repeated."""
    sizes = _listed(call, 1, "size")
    layout = call.x.layout
    if layout is None:
        return call.moves_unknown(rank=len(sizes))
    for axis in layout.axes:
        number = call.flow(sizes[axis.position]).number
        if number != -1 and number != layout.size_at(axis.position):
            raise LayoutError("it expands the axis of the units")
    return call.keeps(rank=len(sizes))


def repeated(call: Call) -> Flow:
    """``repeat``: axes without units, or the units themselves one run after another."""
    counts = call.numbers(_listed(call, 1, "repeats"))
    layout = call.x.layout
    if layout is None:
        return call.moves_unknown(rank=len(counts))
    for axis in layout.axes:
        count = counts[axis.position] if -axis.position <= len(counts) else 1
        if count != 1:
            raise LayoutError("it repeats the axis of the units")
    return call.keeps(rank=len(counts))


def rolled(call: Call) -> Flow:
    """``roll``, ``flip``: along axes without units."""
    if call.x.layout is None:
        return call.moves_unknown()
    is_flip = "flip" in str(getattr(call.node.target, "__name__", call.node.target))
    axes = call.argument(1 if is_flip else 2, "dims")
    if axes is None:
        raise LayoutError("it moves entries along all axes")
    for axis in axes if isinstance(axes, (list, tuple)) else [axes]:
        if call.x.layout.axis_at(call.position(axis)) is not None:
            raise LayoutError("it moves entries along the axis of the units")
    return call.keeps()


def _listed(call: Call, place: int, name: str) -> Sequence[Any]:
    """Return arguments that may be given one by one or as a list."""
    first = call.argument(place, name)
    if isinstance(first, (list, tuple)):
        return first
    return call.node.args[place:]


declare(("flatten",), flattened)
declare(("unflatten",), unflattened)
declare(("reshape", "view"), reshaped)
declare(("permute",), permuted)
declare(("transpose", "swapaxes", "swapdims"), transposed)
declare(("unsqueeze",), axis_inserted)
declare(("squeeze",), axis_removed)
declare(("mean", "sum", "amax", "amin"), reduced)
declare(("expand",), expanded)
declare(("repeat",), repeated)
declare(("roll", "flip"), rolled)
RULES[nn.Flatten] = flattened
RULES[nn.Unflatten] = unflattened
