"""Where the units of a value are: which axes count them, and which unit is at which index.

Axes are counted from the end, so that a batch axis may be absent. No size but that of the labelled axes need
be known: a flattened feature map knows that each unit takes up a run of equal length, not how long it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from biofx.analysis.forward import CannotFollow


@dataclass(frozen=True)
class Axis:
    """An axis of a value along which units differ."""

    position: int
    """Counted from the end, so negative."""
    dims: tuple[int | None, ...]
    """The dimensions of the labels that the axis is made of, outermost first; None is one of unknown size,
    along which the unit stays the same."""

    @property
    def known_dims(self) -> list[int]:
        """The dimensions of the labels."""
        return [dim for dim in self.dims if dim is not None]

    def renumbered(self, places: Mapping[int, int]) -> Axis:
        """Return the axis with other numbers for the dimensions of the labels."""
        return Axis(self.position, tuple(None if dim is None else places[dim] for dim in self.dims))


@dataclass(frozen=True)
class UnitLayout:
    """Where the units of a value are."""

    labels: Tensor
    """Number of the unit at each index, int64; one dimension for each that the axes name."""
    axes: tuple[Axis, ...]

    @classmethod
    def along(cls, labels: Tensor, position: int) -> UnitLayout:
        """Return the layout of a value with one unit per index of one axis."""
        return cls(labels, (Axis(position, (0,)),))

    def axis_at(self, position: int) -> Axis | None:
        """Return the labelled axis at a position, None if units do not differ along it."""
        return next((axis for axis in self.axes if axis.position == position), None)

    def size_at(self, position: int) -> int | None:
        """Return the size of a labelled axis, None where it is not known."""
        axis = self.axis_at(position)
        return None if axis is None or None in axis.dims else self._known_size(axis)

    def columns(self, position: int, size: int) -> Tensor:
        """Return the units that are read at each index of an axis, ``(size, units per index)``.

        Raises:
            CannotFollow: the axis has no units, or another size.
        """
        axis = self.axis_at(position)
        if axis is None:
            where = " and ".join(f"axis {axis.position}" for axis in self.axes) or "no axis"
            raise CannotFollow(f"its units lie along {where}, and not along axis {position}")
        known = self._known_size(axis)
        if not size or not known:
            raise CannotFollow(f"there are no units along axis {position}")
        if size % known or (None not in axis.dims and size != known):
            raise CannotFollow(f"{known} units were expected along axis {position}, found {size}")
        table, _ = self._in_front(axis)
        for place, dim in enumerate(axis.dims):
            if dim is None:
                table = table.unsqueeze(place)
                table = table.expand(*table.shape[:place], size // known, *table.shape[place + 1 :])
        return table.reshape(size, -1)

    def shifted(self, from_position: int, by: int) -> UnitLayout:
        """Return the layout after axes were inserted (``by`` < 0) or removed right of the axes up to a
        position."""
        return self.moved(
            {axis.position: axis.position + by for axis in self.axes if axis.position <= from_position}
        )

    def with_runs(self, position: int) -> UnitLayout:
        """Return the layout with each entry of an axis repeated a number of times that is not known."""
        axes = (
            Axis(axis.position, (*axis.dims, None))
            if axis.position == position and axis.dims[-1:] != (None,)
            else axis
            for axis in self.axes
        )
        return UnitLayout(self.labels, tuple(axes))

    def moved(self, positions: Mapping[int, int]) -> UnitLayout:
        """Return the layout with axes at other positions."""
        axes = (Axis(positions.get(axis.position, axis.position), axis.dims) for axis in self.axes)
        return UnitLayout(self.labels, tuple(axes))

    def flattened(self, first: int, last: int) -> UnitLayout:
        """Return the layout after the axes ``first`` to ``last`` became one."""
        dims: list[int | None] = []
        for position in range(first, last + 1):
            axis = self.axis_at(position)
            for dim in (None,) if axis is None else axis.dims:
                if dim is not None or not dims or dims[-1] is not None:
                    dims.append(dim)
        if dims.count(None) > 1:
            raise CannotFollow("it flattens axes without units on both sides of those with units")
        axes = [axis for axis in self.axes if not first <= axis.position <= last]
        if any(dim is not None for dim in dims):
            axes.append(Axis(last, tuple(dims)))
        return UnitLayout(self.labels, tuple(axes))._joined().shifted(first - 1, last - first)

    def unflattened(self, position: int, sizes: Sequence[int | None]) -> UnitLayout:
        """Return the layout after one axis became several; of a labelled one, all sizes must be known.

        At most one size may be left open (None) if the axis has no run of unknown length.
        """
        axis = self.axis_at(position)
        added = len(sizes) - 1
        if axis is None:
            return self.shifted(position - 1, -added)
        total = self.size_at(position)
        if total is None:
            raise CannotFollow("the size of a flattened axis is not known, and it is taken apart")
        product = math.prod(size for size in sizes if size is not None)
        open_size = total // max(1, product) if sizes.count(None) == 1 else 0
        given = [open_size if size is None else size for size in sizes]
        if sizes.count(None) > 1 or math.prod(given) != total:
            raise CannotFollow(f"an axis of {total} units is taken apart into {tuple(sizes)}")
        table, others = self._in_front(axis)
        # units do not differ along an axis of size 1
        differing = [place for place, size in enumerate(given) if size != 1] or [0]
        labels = table.reshape(*(given[place] for place in differing), *table.shape[len(axis.dims) :])
        places = {dim: len(differing) + place for place, dim in enumerate(others)}
        axes = tuple(entry.renumbered(places) for entry in self.axes if entry is not axis)
        moved = UnitLayout(labels, axes).shifted(position - 1, -added).axes
        new = tuple(Axis(position - added + place, (dim,)) for dim, place in enumerate(differing))
        return UnitLayout(labels, (*moved, *new))

    def taken(self, position: int, index: int | slice | Tensor) -> UnitLayout:
        """Return the layout after indexing one axis; a number takes the axis away."""
        axis = self.axis_at(position)
        layout = self
        if axis is not None:
            dim = axis.dims[0]
            if len(axis.dims) != 1 or dim is None:
                raise CannotFollow("a flattened axis is indexed")
            if not isinstance(index, int):
                chosen = torch.arange(self.labels.shape[dim])[index]
                return UnitLayout(self.labels.index_select(dim, chosen), self.axes)
            places = {other: other - (other > dim) for other in range(self.labels.dim())}
            axes = tuple(entry.renumbered(places) for entry in self.axes if entry is not axis)
            layout = UnitLayout(self.labels.select(dim, index), axes)
        return layout.shifted(position - 1, 1) if isinstance(index, int) else layout

    def _joined(self) -> UnitLayout:
        """Return the same layout with dimensions that follow each other in an axis made one."""
        order: list[list[int]] = []
        axes = []
        for axis in self.axes:
            dims: list[int | None] = []
            for place, dim in enumerate(axis.dims):
                if dim is None:
                    dims.append(None)
                elif place and axis.dims[place - 1] is not None:
                    order[-1].append(dim)
                else:
                    dims.append(len(order))
                    order.append([dim])
            axes.append(Axis(axis.position, tuple(dims)))
        named = {dim for dims in order for dim in dims}
        order += [[dim] for dim in range(self.labels.dim()) if dim not in named]
        shape = [math.prod(self.labels.shape[dim] for dim in dims) for dims in order]
        labels = self.labels.permute([dim for dims in order for dim in dims]).reshape(shape)
        return UnitLayout(labels, tuple(axes))

    def _in_front(self, axis: Axis) -> tuple[Tensor, list[int]]:
        """Return the labels with the dimensions of an axis first, and the other dimensions in order."""
        others = [dim for dim in range(self.labels.dim()) if dim not in axis.dims]
        return self.labels.permute(*axis.known_dims, *others), others

    def _known_size(self, axis: Axis) -> int:
        return math.prod(self.labels.shape[dim] for dim in axis.known_dims)


def concatenated(layouts: Sequence[UnitLayout], position: int) -> UnitLayout:
    """Return the layout of a concatenation along a labelled axis.

    Raises:
        CannotFollow: the layouts differ in more than the labels along it.
    """
    first = layouts[0]
    axis = first.axis_at(position)
    if axis is None or len(axis.dims) != 1 or axis.dims[0] is None:
        raise CannotFollow(f"a concatenated value has no units along axis {position}, or a flattened axis")
    if any(layout.axes != first.axes for layout in layouts):
        raise CannotFollow("the concatenated values have their units along different axes")
    try:
        labels = torch.cat([layout.labels for layout in layouts], axis.dims[0])
    except RuntimeError as error:
        raise CannotFollow("the concatenated values differ in their other axes") from error
    return UnitLayout(labels, first.axes)


# Where units are after a reshape, whose sizes are mostly not known. A reshape keeps axes, merges neighbours
# or takes one apart. Which of these it does is found by laying the axes and the given sizes side by side in
# all ways that the known numbers allow, and taking the one with the fewest merges and splits. Where two of
# those leave the units in different places, the reshape is not followed.


@dataclass(frozen=True)
class Size:
    """One of the sizes that are given to a reshape."""

    number: int | None = None
    """The size itself, None where it is not known."""
    axes: int | None = None
    """Of a size that is not known: of how many axes of a value it is the product, None if that is not known
    either, or if it is the one left open (-1)."""


Block = tuple[int, int]
"""How many axes become how many; one of the two is 1."""


def reshaped_layout(layout: UnitLayout, rank: int | None, sizes: Sequence[Size]) -> UnitLayout:
    """Return the layout of a reshaped value.

    Raises:
        CannotFollow: it cannot be said where the units are.
    """
    if rank is None:
        return _without_rank(layout, sizes)
    ways = list(_ways([layout.size_at(place - rank) for place in range(rank)], sizes, 0, 0))
    if not ways:
        raise CannotFollow("it takes apart or merges axes in a way that cannot be followed")
    lowest = min(cost for cost, _ in ways)
    first, *others = (_applied(layout, blocks, sizes) for cost, blocks in ways if cost == lowest)
    if any(not _same(first, other) for other in others):
        raise CannotFollow(
            "it reshapes axes whose sizes are not known, and where the units are then cannot be said"
        )
    return first


def _ways(
    known: Sequence[int | None], sizes: Sequence[Size], axis: int, size: int
) -> Iterator[tuple[int, tuple[Block, ...]]]:
    """Yield each way to lay axes and sizes side by side from one of each on, and what it costs."""
    rank = len(known)
    if axis == rank and size == len(sizes):
        yield 0, ()
        return
    blocks: list[Block] = []
    if axis < rank and size < len(sizes):
        blocks = [(1, 1)]
        blocks += [(1, many) for many in range(2, len(sizes) - size + 1)]
        blocks += [(many, 1) for many in range(2, rank - axis + 1)]
    for block in blocks:
        ends = axis + block[0], size + block[1]
        cost = _cost(known[axis : ends[0]], sizes[size : ends[1]], is_first=size == 0)
        if cost is not None:
            for others, rest in _ways(known, sizes, *ends):
                yield cost + others, (block, *rest)


def _cost(axes: Sequence[int | None], sizes: Sequence[Size], *, is_first: bool) -> int | None:
    """Return what it costs that axes become these sizes, None if it cannot be.

    The costs rank what people write: a size read off a value is that of one axis, ``-1`` in front is the
    batch, a number is one of channels rather than of anything else, and channels alone rather than with axes
    of size 1.
    """
    if len(axes) == len(sizes) == 1:
        return _cost_of_keeping(axes[0], sizes[0])
    if len(sizes) == 1:
        return _cost_of_merging(axes, sizes[0], is_first=is_first)
    product = math.prod(size.number for size in sizes if size.number is not None)
    all_known = all(size.number is not None for size in sizes)
    if axes[0] is not None and (axes[0] % max(1, product) or (all_known and axes[0] != product)):
        return None
    return 2 + sum(size.axes is not None for size in sizes)


def _cost_of_keeping(axis: int | None, size: Size) -> int | None:
    if size.number is None:
        return 0 if size.axes in (None, 1) else 1
    if axis is None:
        return 2
    return 0 if axis == size.number else None


def _cost_of_merging(axes: Sequence[int | None], size: Size, *, is_first: bool) -> int | None:
    if size.axes is not None:
        return 0 if size.axes == len(axes) else None
    if size.number is None:
        return 3 if is_first else 2
    product = math.prod(axis for axis in axes if axis is not None)
    if size.number % max(1, product) or (None not in axes and size.number != product):
        return None
    return 4 if None in axes and size.number == product else 2


def _applied(layout: UnitLayout, blocks: Sequence[Block], sizes: Sequence[Size]) -> UnitLayout:
    position, left = -1, len(sizes)
    for axes, many in reversed(blocks):
        if axes > 1:
            layout = layout.flattened(position - axes + 1, position)
        elif many > 1:
            layout = layout.unflattened(position, [size.number for size in sizes[left - many : left]])
        position, left = position - many, left - many
    return layout


def _without_rank(layout: UnitLayout, sizes: Sequence[Size]) -> UnitLayout:
    """Follow a reshape of a value with any number of axes in front: what is behind must be known numbers."""
    position, left = -1, len(sizes)
    while any(axis.position <= position for axis in layout.axes):
        total = layout.size_at(position)
        if total is None:
            raise CannotFollow("the number of axes that it reshapes is not known")
        count, product = 0, 1
        while product < total or not count:
            number = sizes[left - count - 1].number if count < left else None
            if number is None:
                raise CannotFollow("the number of axes that it reshapes is not known")
            count, product = count + 1, product * number
        if product != total:
            raise CannotFollow(
                f"an axis of {total} units is taken apart or merged in a way that is not known"
            )
        if count > 1:
            layout = layout.unflattened(position, [size.number for size in sizes[left - count : left]])
        position, left = position - count, left - count
    return layout


def _same(one: UnitLayout, other: UnitLayout) -> bool:
    return set(one.axes) == set(other.axes) and one.labels.equal(other.labels)
