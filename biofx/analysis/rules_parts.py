"""Operations that take a value apart: an index, a chunk, an unbound axis, and the sizes of its axes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from biofx.analysis.flow import NOTHING, RULES, Call, Flow
from biofx.analysis.layout import Layout, LayoutError
from biofx.analysis.rules_elementwise import declare


def indexed(call: Call) -> Flow:
    """``x[…]``: an entry of a tuple, or part of a tensor."""
    index = call.argument(1, "index")
    flow = call.x
    if flow.parts is not None:
        return _entry(call, flow.parts, index)
    if flow.tail is not None:
        return _entry_from_the_end(flow, index)
    if flow.layout is None:
        return call.moves_unknown() if flow.origin is not None else NOTHING
    entries = list(index) if isinstance(index, tuple) else [index]
    place = next((number for number, entry in enumerate(entries) if entry is Ellipsis), None)
    if place is not None:
        front, back = entries[:place], entries[place + 1 :]
    else:
        front, back = entries, []
    layout, rank = flow.layout, flow.rank
    for number, entry in enumerate(reversed(back)):
        layout, rank, removed = _taken(layout, rank, -1 - number, entry)
        if removed:
            raise LayoutError("it takes an axis away behind an ellipsis")
    if front and rank is None and any(entry != slice(None) for entry in front):
        raise LayoutError("it indexes axes from the front, and the number of axes is not known")
    position = -(rank or 0)
    for entry in front:
        # a new axis comes before the one that is next
        layout, rank, _ = _taken(layout, rank, position - (entry is None), entry)
        position += entry is not None
    return call.keeps(rank=rank).replace(layout=layout)


def _entry_from_the_end(sizes: Flow, index: Any) -> Flow:
    """Return what is known of an entry, or of all but the last few, of a tuple of unknown length."""
    if isinstance(index, int) and not isinstance(index, bool):
        return _size_along(sizes, index)
    is_front = isinstance(index, slice) and index.start is None and index.step is None
    if is_front and isinstance(index.stop, int) and index.stop < 0 and sizes.tail is not None:
        return Flow(nonnegative=True, tail=sizes.tail[: index.stop])
    return Flow(nonnegative=True)


def _taken(layout: Layout, rank: int | None, position: int, entry: Any) -> tuple[Layout, int | None, bool]:
    """Return layout and rank after one entry of an index, and whether it took its axis away."""
    if entry == slice(None):
        return layout, rank, False
    if entry is None:
        return layout.shifted(position, -1), None if rank is None else rank + 1, False
    labelled = layout.axis_at(position) is not None
    if isinstance(entry, int) and not isinstance(entry, bool):
        return layout.taken(position, entry), None if rank is None else rank - 1, True
    plain = isinstance(entry, slice) and all(
        bound is None or isinstance(bound, int) for bound in (entry.start, entry.stop, entry.step)
    )
    if isinstance(entry, slice) and (plain or not labelled):
        return (layout.taken(position, entry) if labelled else layout), rank, False
    raise LayoutError("its index is computed in the graph")


def _entry(call: Call, parts: tuple[Flow, ...], index: Any) -> Flow:
    if isinstance(index, slice):
        return Flow(parts=parts[index])
    number = call.flow(index).number
    if number is None or not -len(parts) <= number < len(parts):
        return call.ends("its index is computed in the graph")
    return parts[number]


def divided_up(call: Call) -> Flow:
    """``chunk``, ``split``, ``unbind``: parts of an axis."""
    flow = call.x
    if flow.layout is None:
        return call.moves_unknown()
    name = call.node.target if call.node.op == "call_method" else getattr(call.node.target, "__name__", "")
    is_unbind = name == "unbind"
    axis = call.argument(1, "dim", 0) if is_unbind else call.argument(2, "dim", 0)
    position = call.position(axis)
    size = flow.layout.size_at(position)
    if size is None:
        many = flow.replace(number=None)
        if is_unbind:
            many = many.replace(
                layout=flow.layout.shifted(position - 1, 1),
                rank=None if flow.rank is None else flow.rank - 1,
            )
        if flow.layout.axis_at(position) is not None:
            raise LayoutError("it divides a flattened axis")
        return Flow(parts=(many,) * _MANY)
    if is_unbind:
        rank = None if flow.rank is None else flow.rank - 1
        return Flow(
            parts=tuple(
                flow.replace(layout=flow.layout.taken(position, place), rank=rank) for place in range(size)
            )
        )
    parts = _bounds(call, str(name), size)
    return Flow(
        parts=tuple(
            flow.replace(layout=flow.layout.taken(position, slice(start, stop))) for start, stop in parts
        )
    )


_MANY = 1 << 10
"""Parts that an axis of unknown size is taken to have; they are all alike."""


def _bounds(call: Call, name: str, size: int) -> list[tuple[int, int]]:
    """Return where the parts of an axis begin and end."""
    sample = torch.empty(size, device="meta")
    names = {"chunk": "chunks", "split": "split_size", "tensor_split": "indices_or_sections"}
    given = call.argument(1, names.get(name, "split_size_or_sections"))
    if given is None:
        given = call.argument(1, "split_size_or_sections")
    numbers = call.numbers(given) if isinstance(given, (list, tuple)) else call.flow(given).number
    if numbers is None or (isinstance(numbers, list) and None in numbers):
        raise LayoutError("how it divides the axis of the units is computed in the graph")
    divide: Any = {"chunk": Tensor.chunk, "tensor_split": Tensor.tensor_split}.get(name, Tensor.split)
    bounds, start = [], 0
    for part in divide(sample, numbers):
        bounds.append((start, start + len(part)))
        start += len(part)
    return bounds


def attribute(call: Call) -> Flow:
    """``x.shape``, ``x.mT``: sizes that are known; other attributes carry no units."""
    name = call.argument(1, "name")
    if name == "shape":
        return _sizes(call.x)
    if name == "ndim" and call.x.rank is not None:
        return Flow(number=call.x.rank, nonnegative=True)
    if name in ("mT", "T") and call.x.layout is not None:
        return call.keeps().replace(layout=call.x.layout.moved({-1: -2, -2: -1}))
    if name in ("data", "real"):
        return call.keeps()
    return NOTHING if not call.x.has_units or name in _NOT_VALUES else call.moves_unknown()


_NOT_VALUES = frozenset({"device", "dtype", "is_cuda", "requires_grad", "ndim", "layout", "is_nested"})


def sized(call: Call) -> Flow:
    """``x.size()``."""
    axis = call.argument(1, "dim")
    sizes = _sizes(call.x)
    return sizes if axis is None else _size_along(sizes, call.flow(axis).number)


def _size_along(sizes: Flow, axis: int | None) -> Flow:
    known = sizes.tail if sizes.parts is None else sizes.parts
    if axis is None:
        return NOTHING
    if known is not None and (sizes.parts is not None or -len(known) <= axis < 0):
        return known[axis]
    return Flow(nonnegative=True, size_of=1)


def _sizes(flow: Flow) -> Flow:
    layout = flow.layout
    if flow.rank is None:
        size = None if layout is None else layout.size_at(-1)
        last = () if size is None else (Flow(number=size, nonnegative=True, size_of=1),)
        return Flow(nonnegative=True, tail=last)
    sizes = (None if layout is None else layout.size_at(place - flow.rank) for place in range(flow.rank))
    return Flow(parts=tuple(Flow(number=size, nonnegative=True, size_of=1) for size in sizes))


declare(("chunk", "split", "tensor_split", "unbind"), divided_up)
RULES[operator.getitem] = indexed
RULES[getattr] = attribute
RULES["size"] = sized
RULES["dim"] = lambda call: Flow(number=call.x.rank, nonnegative=True)
