"""A tensor that holds the number of a unit in each entry goes through torch's own operations.

Whatever a layout says must be what that tensor then holds; it may say that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from biofx.analysis.forward import CannotFollow
from biofx.analysis.layout import Axis, Size, UnitLayout, concatenated, reshaped_layout

Pair = tuple[Tensor, UnitLayout]
Step = Callable[[Any, Tensor, UnitLayout], Pair]


def units_along(value: Tensor, position: int) -> list[set[int]]:
    """What stands at each index of an axis."""
    return [set(part.flatten().tolist()) for part in value.unbind(position)]


def check(value: Tensor, layout: UnitLayout) -> int:
    """Compare a layout with the tensor at each axis, and return at how many it said anything."""
    answers = 0
    for position in range(-value.dim(), 0):
        try:
            columns = layout.columns(position, value.shape[position])
        except CannotFollow:
            continue
        assert [set(row.tolist()) for row in columns] == units_along(value, position)
        answers += 1
    return answers


@st.composite
def starts(draw: st.DrawFn) -> Pair:
    """A value of two to four axes with units along one or two of them."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4))
    positions = draw(st.lists(st.integers(-len(shape), -1), min_size=1, max_size=2, unique=True))
    sizes = [shape[position] for position in positions]
    labels = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    axes = tuple(Axis(position, (dim,)) for dim, position in enumerate(positions))
    order = sorted(range(len(positions)), key=lambda dim: positions[dim])
    value = labels.permute(order)
    for place in range(len(shape)):
        if place - len(shape) not in positions:
            value = value.unsqueeze(place)
    return value.expand(shape).contiguous(), UnitLayout(labels, axes)


def flatten(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    first = draw(st.integers(-value.dim(), -1))
    last = draw(st.integers(first, -1))
    return value.flatten(first, last), layout.flattened(first, last)


def unflatten(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    position = draw(st.integers(-value.dim(), -1))
    size = value.shape[position]
    factor = draw(st.sampled_from([part for part in range(1, size + 1) if size % part == 0]))
    sizes: list[int | None] = [factor, size // factor]
    if draw(st.booleans()):
        sizes[draw(st.integers(0, 1))] = None
    return value.unflatten(position, (factor, size // factor)), layout.unflattened(position, sizes)


def transpose(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    first, second = (draw(st.integers(-value.dim(), -1)) for _ in range(2))
    return value.transpose(first, second), layout.moved({first: second, second: first})


def permute(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    order = draw(st.permutations(range(-value.dim(), 0)))
    return value.permute(*order), layout.moved({old: new - len(order) for new, old in enumerate(order)})


def unsqueeze(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    position = draw(st.integers(-value.dim() - 1, -1))
    return value.unsqueeze(position), layout.shifted(position, -1)


def squeeze(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    ones = [p for p in range(-value.dim(), 0) if value.shape[p] == 1 and layout.axis_at(p) is None]
    if not ones:
        return value, layout
    position = draw(st.sampled_from(ones))
    return value.squeeze(position), layout.shifted(position - 1, 1)


def number(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    position = draw(st.integers(-value.dim(), -1))
    index = draw(st.integers(0, value.shape[position] - 1))
    return value.select(position, index), layout.taken(position, index)


def part(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    position = draw(st.integers(-value.dim(), -1))
    start = draw(st.integers(0, value.shape[position] - 1))
    stop = draw(st.integers(start + 1, value.shape[position]))
    entry = slice(start, stop, draw(st.integers(1, 2)))
    index = [slice(None)] * value.dim()
    index[position] = entry
    return value[tuple(index)], layout.taken(position, entry)


def chunk_and_swap(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    position = draw(st.integers(-value.dim(), -1))
    size = value.shape[position]
    cut = draw(st.integers(0, size))
    parts = [layout.taken(position, slice(cut, size)), layout.taken(position, slice(0, cut))]
    pieces = value.split([cut, size - cut], position)
    return torch.cat(pieces[::-1], position), concatenated(parts, position)


def index_list(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    position = draw(st.integers(-value.dim(), -1))
    size = value.shape[position]
    numbers: list[int] = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    chosen = torch.tensor(numbers)
    return value.index_select(position, chosen), layout.taken(position, chosen)


def stack(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    position = draw(st.integers(-value.dim() - 1, -1))
    return torch.stack([value, value], position), layout.shifted(position, -1)


def reshape(draw: Any, value: Tensor, layout: UnitLayout) -> Pair:
    """Merge, keep and take apart; a size is given as a number, as sizes of axes, or left open once."""
    asked: list[Size] = []
    shape: list[int] = []
    place, is_open = 0, False
    while place < value.dim():
        many = draw(st.integers(1, min(2, value.dim() - place)))
        merged = torch.Size(value.shape[place : place + many]).numel()
        is_units = many == 1 and layout.size_at(place - value.dim()) is not None
        factors = [f for f in range(2, merged) if merged % f == 0] if is_units else []
        if factors and draw(st.booleans()):
            factor = draw(st.sampled_from(factors))
            asked += [Size(factor), Size(merged // factor)]
            shape += [factor, merged // factor]
        elif not is_open and draw(st.booleans()):
            is_open = True
            asked.append(Size())
            shape.append(merged)
        else:
            # numbers are those of units; the sizes of other axes are read off the value, as in x.size(0)
            inside = range(place - value.dim(), place - value.dim() + many)
            is_known = all(layout.size_at(position) is not None for position in inside)
            asked.append(Size(merged) if is_known and draw(st.booleans()) else Size(axes=many))
            shape.append(merged)
        place += many
    return value.reshape(shape), reshaped_layout(layout, value.dim(), asked)


STEPS = (
    *(flatten, unflatten, transpose, permute, unsqueeze, squeeze, number, part, chunk_and_swap, index_list),
    stack,
)


@settings(max_examples=250, deadline=None)
@given(st.data(), starts(), st.lists(st.sampled_from(STEPS), min_size=1, max_size=5))
def test_a_layout_says_what_a_tensor_of_units_holds(
    data: st.DataObject, start: Pair, steps: list[Step]
) -> None:
    value, layout = start
    assert check(value, layout) == len(layout.axes)
    for step in steps:
        if value.dim() == 0 or value.dim() > 6:
            break
        try:
            value, layout = step(data.draw, value, layout)
        except CannotFollow:
            break
        if value.dim():
            check(value, layout)


@settings(max_examples=250, deadline=None)
@given(st.data(), starts(), st.lists(st.sampled_from([reshape, reshape, transpose]), min_size=1, max_size=3))
def test_a_reshape_of_axes_is_followed_or_refused(
    data: st.DataObject, start: Pair, steps: list[Step]
) -> None:
    value, layout = start
    for step in steps:
        try:
            value, layout = step(data.draw, value, layout)
        except CannotFollow:
            break
        check(value, layout)


def test_a_flattened_map_knows_its_runs_without_knowing_the_map() -> None:
    flat = UnitLayout.along(torch.arange(3), -3).flattened(-3, -1)
    assert flat.axes == (Axis(-1, (0, None)),)
    assert flat.size_at(-1) is None
    assert flat.columns(-1, 12).flatten().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert flat.columns(-1, 3).flatten().tolist() == [0, 1, 2]


def test_channels_last_flattened_repeats_the_units() -> None:
    flat = UnitLayout.along(torch.arange(3), -1).flattened(-3, -1)
    assert flat.columns(-1, 6).flatten().tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda layout: layout.columns(-1, 4), "lie along axis -3, and not along axis -1"),
        (lambda layout: layout.columns(-3, 5), "4 units were expected along axis -3, found 5"),
        (
            lambda layout: layout.flattened(-3, -1).columns(-1, 6),
            "4 units were expected along axis -1, found 6",
        ),
        (lambda layout: layout.flattened(-4, -1), "on both sides"),
        (lambda layout: layout.flattened(-3, -1).unflattened(-1, [4, 9]), "size of a flattened axis"),
        (lambda layout: layout.unflattened(-3, [3, None]), "taken apart into"),
        (lambda layout: layout.flattened(-3, -1).taken(-1, slice(2)), "a flattened axis is indexed"),
        (lambda layout: concatenated([layout, layout], -1), "no units along axis -1"),
        (lambda layout: concatenated([layout, layout.flattened(-3, -2)], -3), "along different axes"),
    ],
)
def test_what_is_not_known_is_not_said(ask: Callable[[UnitLayout], Any], words: str) -> None:
    with pytest.raises(CannotFollow, match=words):
        ask(UnitLayout.along(torch.arange(4), -3))
