from __future__ import annotations

import copy
import math
import operator
from typing import Any

import pytest
import torch

from biofx.capture.symbolic_scalars import SymFloat, SymInt, plain, symbolic


class Frame:
    """Takes down what numbers ask of a frame."""

    is_current = True

    def __init__(self) -> None:
        self.expected: list[tuple[Any, ...]] = []

    def auxiliary(self, function: Any, args: tuple[Any, ...]) -> Any:
        return function.__name__, *args

    def expect(self, function: Any, operands: tuple[Any, ...], found: Any) -> None:
        self.expected.append((function.__name__, *map(plain, operands), found))


def number(value: Any, frame: Frame) -> Any:
    return symbolic(value, frame, lambda: "n")  # type: ignore[arg-type, return-value]


def test_arithmetic_remembers_where_it_comes_from() -> None:
    size = number(6, Frame())
    cases: list[tuple[Any, Any, Any]] = [
        (size * 2, 12, ("mul", "n", 2)),
        (7 - size, 1, ("sub", 7, "n")),
        (size // 4 + 1, 2, ("add", ("floordiv", "n", 4), 1)),
        (-size, -6, ("neg", "n")),
        (size / 4, 1.5, ("truediv", "n", 4)),
        (size**-0.5, 6**-0.5, ("pow", "n", -0.5)),
    ]
    for found, value, node in cases:
        assert isinstance(found, SymInt if isinstance(value, int) else SymFloat)
        assert plain(found) == value
        assert type(plain(found)) is type(value)
        assert found.node == node


def test_a_number_stays_itself_inside_a_shape() -> None:
    size = number(6, Frame())
    assert torch.Size((size, 2))[:1][0] is size
    assert torch.zeros(size, 2).view(size, -1).shape == (6, 2)


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda n: n == 6, ("eq", 6, 6, True)),
        (lambda n: n > 7, ("gt", 6, 7, False)),
        (bool, ("bool", 6, True)),
        (int, ("int", 6, 6)),
        (math.sqrt, ("float", 6, 6.0)),
    ],
)
def test_a_question_that_decides_is_taken_down(ask: Any, expected: tuple[Any, ...]) -> None:
    frame = Frame()
    ask(number(6, frame))
    assert frame.expected == [expected]


def test_outside_its_frame_it_is_a_number_like_any_other() -> None:
    frame = Frame()
    size = number(6, frame)
    frame.is_current = False
    assert type(size * 2) is int
    assert size == 6
    assert frame.expected == []
    assert type(copy.deepcopy(size)) is int
    assert repr(size) == f"{size}" == "6"
    assert operator.index(plain(size)) == 6
    assert symbolic(True, frame, lambda: None) is True  # type: ignore[arg-type, return-value]
