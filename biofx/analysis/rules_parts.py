"""Operations that take values apart or put them together: an index, a chunk, sizes, ``cat``, ``stack``."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from biofx.analysis.forward import CannotFollow, declare
from biofx.analysis.layout import UnitLayout, concatenated
from biofx.analysis.replication import Outcome, ReplicationCall
from biofx.analysis.units import NOTHING, UnitCall, UnitValue, observed_only
from biofx.operators.split_ops import full_size

# units


def indexed(call: UnitCall) -> UnitValue:
    """``x[…]``: an entry of a tuple, or part of a tensor."""
    index = call.argument(1, "index")
    value = call.x
    if value.parts is not None:
        return _entry(call, value.parts, index)
    if value.tail is not None:
        return _entry_from_the_end(value, index)
    if value.layout is None:
        return call.moves_unknown() if value.origin is not None else NOTHING
    entries = list(index) if isinstance(index, tuple) else [index]
    place = next((number for number, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    front, back = entries[:place], entries[place + 1 :]
    layout, rank = value.layout, value.rank
    for number, entry in enumerate(reversed(back)):
        layout, rank, removed = _taken(layout, rank, -1 - number, entry)
        if removed:
            raise CannotFollow("it takes an axis away behind an ellipsis")
    if front and rank is None and any(entry != slice(None) for entry in front):
        raise CannotFollow("it indexes axes from the front, and the number of axes is not known")
    position = -(rank or 0)
    for entry in front:
        # a new axis comes before the one that is next
        layout, rank, _ = _taken(layout, rank, position - (entry is None), entry)
        position += entry is not None
    return call.keeps(rank=rank, layout=layout)


def _entry_from_the_end(sizes: UnitValue, index: Any) -> UnitValue:
    """Return what is known of an entry, or of all but the last few, of a tuple of unknown length."""
    if isinstance(index, int) and not isinstance(index, bool):
        return _size_along(sizes, index)
    is_front = isinstance(index, slice) and index.start is None and index.step is None
    if is_front and isinstance(index.stop, int) and index.stop < 0 and sizes.tail is not None:
        return UnitValue(nonnegative=True, tail=sizes.tail[: index.stop])
    return UnitValue(nonnegative=True)


def _taken(
    layout: UnitLayout, rank: int | None, position: int, entry: Any
) -> tuple[UnitLayout, int | None, bool]:
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
    raise CannotFollow("its index is computed in the graph")


def _entry(call: UnitCall, parts: tuple[UnitValue, ...], index: Any) -> UnitValue:
    if isinstance(index, slice):
        return UnitValue(parts=parts[index])
    number = call.value(index).number
    if number is None or not -len(parts) <= number < len(parts):
        return call.ends("its index is computed in the graph")
    return parts[number]


def divided_up(call: UnitCall) -> UnitValue:
    """``chunk``, ``split``, ``unbind``: parts of an axis."""
    value, layout = call.x, call.layout
    if layout is None:
        return call.moves_unknown()
    is_unbind = call.name == "unbind"
    position = call.position(call.argument(1 if is_unbind else 2, "dim", 0))
    size = layout.size_at(position)
    if size is None and layout.axis_at(position) is not None:
        raise CannotFollow("it divides a flattened axis")
    if is_unbind:
        value = value.replace(rank=None if value.rank is None else value.rank - 1)
    if size is None:
        shifted = layout.shifted(position - 1, 1) if is_unbind else layout
        return UnitValue(parts=(value.replace(number=None, layout=shifted),) * _MANY)
    entries = range(size) if is_unbind else _slices(call, size)
    return UnitValue(parts=tuple(value.replace(layout=layout.taken(position, entry)) for entry in entries))


_MANY = 1 << 10
"""Parts that an axis of unknown size is taken to have; they are all alike."""


def _slices(call: UnitCall, size: int) -> list[slice]:
    """Return where the parts of an axis begin and end."""
    names = {"chunk": "chunks", "split": "split_size", "tensor_split": "indices_or_sections"}
    given = call.argument(1, names.get(call.name, "split_size_or_sections"))
    if given is None:
        given = call.argument(1, "split_size_or_sections")
    numbers = call.numbers(given) if isinstance(given, (list, tuple)) else call.value(given).number
    if numbers is None or (isinstance(numbers, list) and None in numbers):
        raise CannotFollow("how it divides the axis of the units is computed in the graph")
    divide: Any = {"chunk": Tensor.chunk, "tensor_split": Tensor.tensor_split}.get(call.name, Tensor.split)
    lengths = [len(part) for part in divide(torch.empty(size, device="meta"), numbers)]
    ends = list(itertools.accumulate(lengths, initial=0))
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def attribute(call: UnitCall) -> UnitValue:
    """``x.shape``, ``x.mT``: sizes that are known; other attributes carry no units."""
    name = call.argument(1, "name")
    if name == "shape":
        return _sizes(call.x)
    if name == "ndim" and call.x.rank is not None:
        return UnitValue(number=call.x.rank, nonnegative=True)
    if name in ("mT", "T") and call.x.layout is not None:
        return call.keeps(layout=call.x.layout.moved({-1: -2, -2: -1}))
    if name in ("data", "real"):
        return call.keeps()
    return NOTHING if not call.x.has_units or name in _NOT_VALUES else call.moves_unknown()


_NOT_VALUES = frozenset({"device", "dtype", "is_cuda", "requires_grad", "ndim", "layout", "is_nested"})


def sized(call: UnitCall) -> UnitValue:
    """``x.size()``."""
    axis = call.argument(1, "dim")
    sizes = _sizes(call.x)
    return sizes if axis is None else _size_along(sizes, call.value(axis).number)


def _size_along(sizes: UnitValue, axis: int | None) -> UnitValue:
    known = sizes.tail if sizes.parts is None else sizes.parts
    if axis is None:
        return NOTHING
    if known is not None and (sizes.parts is not None or -len(known) <= axis < 0):
        return known[axis]
    return UnitValue(nonnegative=True, size_of=1)


def _sizes(value: UnitValue) -> UnitValue:
    layout = value.layout
    if value.rank is None:
        size = None if layout is None else layout.size_at(-1)
        last = () if size is None else (UnitValue(number=size, nonnegative=True, size_of=1),)
        return UnitValue(nonnegative=True, tail=last)
    sizes = (None if layout is None else layout.size_at(place - value.rank) for place in range(value.rank))
    return UnitValue(parts=tuple(UnitValue(number=size, nonnegative=True, size_of=1) for size in sizes))


def _joined_parts(call: UnitCall) -> tuple[UnitValue, ...] | None:
    """Return what is known of the values that an operation joins.

    Raises:
        CannotFollow: they are in a list that the graph fills.
    """
    given = call.value(call.argument(0, "tensors"))
    if given.parts is None and given.has_units:
        raise CannotFollow("it joins what is in a list that was filled one by one")
    return given.parts


def joined(call: UnitCall) -> UnitValue:
    """``cat``: along the axis of the units they come side by side, along another they are one."""
    parts = _joined_parts(call)
    axis = call.argument(1, "dim", call.node.kwargs.get("axis", 0))
    if not parts or not any(part.has_units for part in parts):
        return NOTHING
    nonnegative = all(part.nonnegative for part in parts)
    known = [part for part in parts if part.layout is not None]
    if not known:
        if all(part.origin is parts[0].origin for part in parts):
            return call.keeps(parts[0], nonnegative=nonnegative)
        return call.ends("none of the values that it concatenates has known units")
    ranked = next((part for part in parts if part.rank is not None), parts[0])
    position = call.position(axis, ranked)
    pattern = known[0].layout
    if pattern is None or pattern.axis_at(position) is None:
        return call.unified(parts).replace(nonnegative=nonnegative)
    layouts = [part.layout or call.known_layout(part, pattern.axes) for part in parts]
    given = [layout for layout in layouts if layout is not None]
    if len(given) < len(layouts):
        raise CannotFollow("one of the values that it concatenates has units that are not known")
    return ranked.replace(layout=concatenated(given, position), origin=None, nonnegative=nonnegative)


def stacked(call: UnitCall) -> UnitValue:
    """``stack``: side by side along a new axis, so one, index by index."""
    parts = _joined_parts(call)
    if not parts or not any(part.has_units for part in parts):
        return NOTHING
    whole = call.unified(parts)
    if whole.layout is None:
        return call.ends("it stacks values whose units are not known")
    axis = call.argument(1, "dim", 0)
    layout = whole.layout
    if axis != 0 or whole.rank is not None:  # in front of all others it moves none, however many they are
        layout = layout.shifted(call.position(axis, whole, added=1), -1)
    return UnitValue(
        layout=layout,
        rank=None if whole.rank is None else whole.rank + 1,
        nonnegative=all(part.nonnegative for part in parts),
    )


def assigned(call: UnitCall) -> UnitValue:
    """``x[…] = y``: where the index says nothing of the axis of the units, those of both are one."""
    base, value = call.x, call.value(call.argument(2, "value"))
    if not value.has_units and not base.has_units:
        return NOTHING.replace(rank=base.rank, nonnegative=base.nonnegative and value.nonnegative)
    index = call.argument(1, "index")
    entries = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(entry, (int, Node)) or entry == slice(None) for entry in entries)
    layout = value.layout
    if not plain or layout is None or any(axis.position != -1 for axis in layout.axes):
        raise CannotFollow("where it writes units is not known")
    return call.unified((base, value)).replace(
        rank=base.rank, nonnegative=base.nonnegative and value.nonnegative
    )


@observed_only
def largest(call: UnitCall) -> UnitValue:
    """``topk``, ``sort``: entries in another order, which values decide, and where they were."""
    ended = call.ends("values decide in which order its entries are")
    return UnitValue(parts=(ended.replace(nonnegative=call.x.nonnegative), NOTHING))


# replication


def _cat(call: ReplicationCall) -> Outcome:
    """Joins equal replications: along the channels there are then more connections."""
    tensors = call.argument(0, "tensors")
    if not isinstance(tensors, (tuple, list)) or any(tensor not in call.inputs for tensor in tensors):
        raise CannotFollow("not all that it joins repeat their channels")
    pieces = [call.inputs[tensor] for tensor in tensors]
    first = pieces[0]
    if len({(piece.axis, piece.gamma, piece.inner, piece.rank) for piece in pieces}) > 1:
        raise CannotFollow("its inputs repeat their channels differently")
    axis = call.from_end(call.fixed(1, "dim", call.fixed(1, "axis", 0)), first)
    if axis != first.axis:
        if any(piece.groups != first.groups for piece in pieces):
            raise CannotFollow("its inputs repeat their channels differently")
        return Outcome(first)
    if first.inner:
        raise CannotFollow("its inputs hold several values for each channel")
    return Outcome(first.replace(groups=sum(piece.groups for piece in pieces)))


def _size(call: ReplicationCall) -> Outcome:
    """The size of the full tensor is computed from that of the compact one; a device is the same for both."""
    is_attribute = call.node.target is getattr
    name = call.argument(1, "name") if is_attribute else "shape"
    source = call.source if name in ("shape", *_SAME_FOR_COMPACT) else None
    if source is None:
        raise CannotFollow(f"it asks for its {name}")
    if name != "shape":
        return Outcome(None)

    def ask_for_full_size(folding: Any) -> None:
        node = call.node
        axis = None if is_attribute else call.argument(1, "dim")
        node.op, node.target = "call_function", full_size
        node.args = (node.args[0],) if axis is None else (node.args[0], axis)
        node.kwargs = {"gamma": source.gamma, "channel_axis": source.axis}

    return Outcome(None, ask_for_full_size, message="answers with the size of all members")


_SAME_FOR_COMPACT = ("device", "dtype", "ndim", "is_cuda", "requires_grad")

# what rules an operation has

declare("chunk", "split", "tensor_split", "unbind", units=divided_up)
declare(operator.getitem, units=indexed)
declare(getattr, units=attribute, replication=_size)
declare("size", units=sized, replication=_size)
declare("dim", units=lambda call: UnitValue(number=call.x.rank, nonnegative=True))
declare("cat", "concat", "concatenate", units=joined, replication=_cat)
declare("stack", units=stacked)
declare("topk", "sort", units=largest)
declare(operator.setitem, units=assigned)
