"""Where units are after a reshape, whose sizes are mostly not known.

A reshape keeps axes, merges neighbours or takes one apart. Which of these it does is found by laying the axes
and the sizes asked for side by side in all ways that the known numbers allow, and taking the one with the
fewest merges and splits. Where two of those leave the units in different places, it is not said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from biofx.analysis.layout import Layout, LayoutError


@dataclass(frozen=True)
class Size:
    """One of the sizes that a reshape asks for."""

    number: int | None = None
    """The size itself, None where it is not known."""
    axes: int | None = None
    """Of a size that is not known: of how many axes of a value it is the product, None if that is not known
    either, or if it is the one left open (-1)."""


Block = tuple[int, int]
"""How many axes become how many; one of the two is 1."""


def reshaped_layout(layout: Layout, rank: int | None, sizes: Sequence[Size]) -> Layout:
    """Return the layout of a reshaped value.

    Raises:
        LayoutError: it cannot be said where the units are.
    """
    if rank is None:
        return _without_rank(layout, sizes)
    ways = list(_ways([layout.size_at(place - rank) for place in range(rank)], sizes, 0, 0))
    if not ways:
        raise LayoutError("it takes apart or merges axes in a way that cannot be followed")
    lowest = min(cost for cost, _ in ways)
    first, *others = (_applied(layout, blocks, sizes) for cost, blocks in ways if cost == lowest)
    if any(not _same(first, other) for other in others):
        raise LayoutError(
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


def _applied(layout: Layout, blocks: Sequence[Block], sizes: Sequence[Size]) -> Layout:
    position, left = -1, len(sizes)
    for axes, many in reversed(blocks):
        if axes > 1:
            layout = layout.flattened(position - axes + 1, position)
        elif many > 1:
            layout = layout.unflattened(position, [size.number for size in sizes[left - many : left]])
        position, left = position - many, left - many
    return layout


def _without_rank(layout: Layout, sizes: Sequence[Size]) -> Layout:
    """Follow a reshape of a value with any number of axes in front: what is behind must be known numbers."""
    position, left = -1, len(sizes)
    while any(axis.position <= position for axis in layout.axes):
        total = layout.size_at(position)
        if total is None:
            raise LayoutError("the number of axes that it reshapes is not known")
        count, product = 0, 1
        while product < total or not count:
            number = sizes[left - count - 1].number if count < left else None
            if number is None:
                raise LayoutError("the number of axes that it reshapes is not known")
            count, product = count + 1, product * number
        if product != total:
            raise LayoutError(f"an axis of {total} units is taken apart or merged in a way that is not known")
        if count > 1:
            layout = layout.unflattened(position, [size.number for size in sizes[left - count : left]])
        position, left = position - count, left - count
    return layout


def _same(one: Layout, other: Layout) -> bool:
    return set(one.axes) == set(other.axes) and one.labels.equal(other.labels)
