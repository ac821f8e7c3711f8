"""Where the units of a value are: which axes count them, and which unit is at which index.

Axes are counted from the end, so that a batch axis may be absent. No size but that of the labelled axes need
be known: a flattened feature map knows that each unit takes up a run of equal length, not how long it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class LayoutError(Exception):
    """What is asked of a layout cannot be said without knowing more of the value's shape."""


@dataclass(frozen=True)
class Axis:
    """An axis of a value along which units differ."""

    position: int
    """Counted from the end, so negative."""
    dims: tuple[int | None, ...]
    """What the axis is made of, outermost first: dimensions of the labels, and None for one of unknown size
    along which the unit stays the same."""


@dataclass(frozen=True)
class Layout:
    """The units of a value."""

    labels: Tensor
    """Number of the unit at each index, int64; one dimension for each that the axes name."""
    axes: tuple[Axis, ...]

    @classmethod
    def along(cls, labels: Tensor, position: int) -> Layout:
        """Return the layout of a value with one unit per index of one axis."""
        return cls(labels, (Axis(position, (0,)),))

    def axis_at(self, position: int) -> Axis | None:
        """Return the labelled axis at a position, None if units do not differ along it."""
        return next((axis for axis in self.axes if axis.position == position), None)

    def size_at(self, position: int) -> int | None:
        """Return the size of a labelled axis, None where it is not known."""
        axis = self.axis_at(position)
        if axis is None or None in axis.dims:
            return None
        return math.prod(self._size(dim) for dim in axis.dims if dim is not None)

    def columns(self, position: int, size: int) -> Tensor:
        """Return the units that are read at each index of an axis, ``(size, units per index)``.

        Raises:
            LayoutError: the axis has no units, or another size.
        """
        axis = self.axis_at(position)
        if axis is None:
            raise LayoutError(f"its units lie along {self._where()}, and not along axis {position}")
        known = math.prod(self._size(dim) for dim in axis.dims if dim is not None)
        if not size or not known:
            raise LayoutError(f"there are no units along axis {position}")
        if size % known or (None not in axis.dims and size != known):
            raise LayoutError(f"{known} units were expected along axis {position}, found {size}")
        run = size // known
        order = [dim for dim in axis.dims if dim is not None]
        others = [dim for dim in range(self.labels.dim()) if dim not in order]
        table = self.labels.permute(*order, *others)
        for place, dim in enumerate(axis.dims):
            if dim is None:
                table = table.unsqueeze(place)
                table = table.expand(*table.shape[:place], run, *table.shape[place + 1 :])
        return table.reshape(size, -1)

    def shifted(self, from_position: int, by: int) -> Layout:
        """Return the layout after axes are inserted (``by`` < 0) or removed right of the axes up to a
        position."""
        return self.moved(
            {axis.position: axis.position + by for axis in self.axes if axis.position <= from_position}
        )

    def moved(self, positions: dict[int, int]) -> Layout:
        """Return the layout with axes at other positions."""
        axes = tuple(
            dataclasses.replace(axis, position=positions.get(axis.position, axis.position))
            for axis in self.axes
        )
        return dataclasses.replace(self, axes=axes)

    def flattened(self, first: int, last: int) -> Layout:
        """Return the layout after the axes ``first`` to ``last`` became one."""
        inside = [self.axis_at(position) for position in range(first, last + 1)]
        dims: list[int | None] = []
        for axis in inside:
            for dim in (None,) if axis is None else axis.dims:
                if dim is not None or not dims or dims[-1] is not None:
                    dims.append(dim)
        if dims.count(None) > 1:
            raise LayoutError("axes without units surround the one with units in what is flattened")
        outside = tuple(axis for axis in self.axes if not first <= axis.position <= last)
        merged = (Axis(last, tuple(dims)),) if any(dim is not None for dim in dims) else ()
        return Layout(self.labels, (*outside, *merged))._joined().shifted(first - 1, last - first)

    def unflattened(self, position: int, sizes: Sequence[int | None]) -> Layout:
        """Return the layout after one axis became several; of a labelled one, all sizes must be known.

        At most one size may be left open (None) if the axis has no run of unknown length.
        """
        axis = self.axis_at(position)
        added = len(sizes) - 1
        if axis is None:
            return self.shifted(position - 1, -added)
        total = self.size_at(position)
        if total is None:
            raise LayoutError("the size of a flattened axis is not known, and it is taken apart")
        given = list(sizes)
        if given.count(None) == 1:
            given[given.index(None)] = total // max(1, math.prod(size for size in sizes if size is not None))
        if None in given or math.prod(size for size in given if size is not None) != total:
            raise LayoutError(f"an axis of {total} units is taken apart into {tuple(sizes)}")
        order = [dim for dim in axis.dims if dim is not None]
        others = [dim for dim in range(self.labels.dim()) if dim not in order]
        table = self.labels.permute(*order, *others)
        # an axis of size 1 tells no units apart, and so is none of those that do
        telling = [place for place, size in enumerate(given) if size != 1] or [0]
        labels = table.reshape(*(given[place] or 0 for place in telling), *table.shape[len(order) :])
        places = {dim: len(telling) + place for place, dim in enumerate(others)}
        kept = tuple(
            Axis(entry.position, tuple(None if dim is None else places[dim] for dim in entry.dims))
            for entry in self.axes
            if entry is not axis
        )
        moved = Layout(labels, kept).shifted(position - 1, -added).axes
        new = tuple(Axis(position - added + place, (dim,)) for dim, place in enumerate(telling))
        return Layout(labels, (*moved, *new))

    def taken(self, position: int, index: int | slice | Tensor) -> Layout:
        """Return the layout after indexing one axis; a number takes the axis away."""
        axis = self.axis_at(position)
        if axis is not None:
            if len(axis.dims) != 1 or axis.dims[0] is None:
                raise LayoutError("a flattened axis is indexed")
            dim = axis.dims[0]
            if isinstance(index, int):
                places = {other: other - (other > dim) for other in range(self.labels.dim())}
                axes = tuple(
                    Axis(entry.position, tuple(None if d is None else places[d] for d in entry.dims))
                    for entry in self.axes
                    if entry is not axis
                )
                return Layout(self.labels.select(dim, index), axes).shifted(position - 1, 1)
            chosen = torch.arange(self._size(dim))[index]
            return dataclasses.replace(self, labels=self.labels.index_select(dim, chosen))
        return self.shifted(position - 1, 1) if isinstance(index, int) else self

    def _joined(self) -> Layout:
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
        left = [[dim] for dim in range(self.labels.dim()) if not any(dim in dims for dims in order)]
        shape = [math.prod(map(self._size, dims)) for dims in (*order, *left)]
        labels = self.labels.permute([dim for dims in (*order, *left) for dim in dims]).reshape(shape)
        return Layout(labels, tuple(axes))

    def _size(self, dim: int) -> int:
        return self.labels.shape[dim]

    def _where(self) -> str:
        return " and ".join(f"axis {axis.position}" for axis in self.axes) or "no axis"


def concatenated(layouts: Sequence[Layout], position: int) -> Layout:
    """Return the layout of a concatenation along a labelled axis.

    Raises:
        LayoutError: the layouts differ in more than the labels along it.
    """
    first = layouts[0]
    axis = first.axis_at(position)
    if axis is None or len(axis.dims) != 1 or axis.dims[0] is None:
        raise LayoutError(f"what is concatenated has no units along axis {position}, or a flattened axis")
    if any(layout.axes != first.axes for layout in layouts):
        raise LayoutError("what is concatenated has its units along different axes")
    try:
        labels = torch.cat([layout.labels for layout in layouts], axis.dims[0])
    except RuntimeError as error:
        raise LayoutError("what is concatenated differs in its other axes") from error
    return dataclasses.replace(first, labels=labels)
