"""What is expected of attributes, and what fits that."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from biofx.model.attribute_guards import MISSING, IsNumber, expectation_of, fields_of, is_followed


class Holder:
    """An object that can be told to say what is read from it."""

    def __init__(self) -> None:
        self.size, self.names = 3, ["a"]


def _loop() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


PAIRS: list[tuple[Any, Any]] = [
    *((1, 2), (1, True), (1, 1.0), ("a", "b"), (None, 0), (0.5, 0.25), (b"a", b"b"), (1j, 2j)),
    *(([1, 2], [1]), ([1, [2]], [1, [3]]), ((1,), [1]), ({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1})),
    *(({1, 2}, {1, 3}), (frozenset({1}), frozenset({2})), (deque([1]), deque([2])), (range(2), range(3))),
    *((torch.relu, torch.tanh), (torch.float32, torch.float64), (MISSING, None), (1, MISSING)),
    (SimpleNamespace(a=1), SimpleNamespace(a=2)),
    (numpy.array([1, 2]), numpy.array([1, 3])),
    (numpy.array([1, 2]), numpy.array([[1, 2]])),
    ([Holder()], [SimpleNamespace(size=3, names=["a"])]),
]


@pytest.mark.parametrize(("value", "other"), PAIRS)
def test_a_value_fits_itself_and_no_other(value: Any, other: Any) -> None:
    expected = expectation_of(value)
    assert expected.fits(value)
    assert expected.fits(copy.deepcopy(value))
    assert pickle.loads(pickle.dumps(expected)).fits(value)
    assert not expected.fits(other)
    assert expected == expectation_of(copy.deepcopy(value))
    assert expected != expectation_of(other)


def test_what_changes_inside_does_not_fit_any_more() -> None:
    value: Any = {"a": [Holder()], "b": numpy.zeros(2)}
    expected = expectation_of(value)
    value["a"][0].names.append("b")
    assert not expected.fits(value)
    value["a"][0].names.pop()
    assert expected.fits(value)
    value["b"][0] = 1.0
    assert not expected.fits(value)


def test_no_number_is_itself_and_what_holds_itself_has_an_end() -> None:
    nan = float("nan")
    assert expectation_of(nan).fits(float("nan"))
    loop = _loop()
    assert expectation_of(loop).fits(loop)


def test_an_object_that_says_what_is_read_only_has_to_stay_of_its_class() -> None:
    holder = Holder()
    assert is_followed(holder)
    expected = expectation_of(holder)
    holder.size = 5
    assert expected.fits(holder)
    assert not expected.fits(None)
    assert fields_of(holder) == {"size": 5, "names": ["a"]}


@pytest.mark.parametrize(
    ("found", "is_one"), [(1, True), (0.5, True), (True, False), (None, False), ("1", False)]
)
def test_a_number_is_whole_or_real(found: Any, is_one: bool) -> None:
    assert IsNumber().fits(found) is is_one
