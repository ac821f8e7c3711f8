"""Checks of option values."""

from __future__ import annotations

import math
from typing import Any

import pytest

from biofx.errors import OptionError
from biofx.operators.rate_sampling import Distribution
from biofx.options import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Choice,
    Flag,
    Range,
)


@pytest.mark.parametrize(
    ("permitted", "text"),
    [
        (POSITIVE, "a number in (0, inf)"),
        (NOT_NEGATIVE, "a number in [0, inf)"),
        (FRACTION, "a number in [0, 1]"),
        (COUNT, "a whole number in [0, inf)"),
        (SEED, "a whole number in [0, 9223372036854775807]"),
        (Range(0, 1, low_open=True), "a number in (0, 1]"),
    ],
)
def test_a_range_reads_as_an_interval(permitted: Range, text: str) -> None:
    assert str(permitted) == text


@pytest.mark.parametrize(
    ("permitted", "value"),
    [
        (POSITIVE, 1e-300),
        (NOT_NEGATIVE, 0),
        (FRACTION, 0),
        (FRACTION, 1),
        (FRACTION, 0.5),
        (COUNT, 0),
        (COUNT, 10**30),
        (SEED, 2**63 - 1),
    ],
)
def test_a_value_inside_is_returned_in_the_type_of_the_range(permitted: Range, value: float) -> None:
    found = permitted.check("x", value)
    assert found == value
    assert type(found) is (int if permitted.whole else float)


@pytest.mark.parametrize(
    ("permitted", "value"),
    [
        (POSITIVE, 0),
        (POSITIVE, -1.0),
        (POSITIVE, math.inf),
        (POSITIVE, math.nan),
        (POSITIVE, 10**400),
        (POSITIVE, True),
        (POSITIVE, "1"),
        (POSITIVE, None),
        (POSITIVE, 1j),
        (NOT_NEGATIVE, -1e-300),
        (FRACTION, 1.0000001),
        (FRACTION, 10**400),
        (COUNT, -1),
        (COUNT, 2.0),
        (COUNT, math.inf),
        (COUNT, False),
        (SEED, 2**63),
        (Range(0, 1, low_open=True), 0),
    ],
)
def test_a_value_outside_is_refused_with_name_value_and_range(permitted: Range, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        permitted.check("nu", value)
    assert str(caught.value) == f"nu: expected {permitted}, found {value!r}"


def test_a_choice_is_returned_as_text() -> None:
    assert Choice(("project", "abs")).check("mode", "abs") == "abs"
    assert Choice(("gamma",)).check("mode", Distribution.GAMMA) == "gamma"


@pytest.mark.parametrize("value", ["pro", 1, None, Distribution.GAMMA, ["abs"]])
def test_a_wrong_choice_is_refused_with_all_choices(value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        Choice(("project", "abs")).check("method", value)
    assert str(caught.value).startswith(f"method: expected one of project, abs, found {value!r}")


def test_a_misspelt_choice_names_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"; did you mean 'project'\?$"):
        Choice(("project", "abs")).check("method", "projekt")


@pytest.mark.parametrize("value", [True, False])
def test_a_flag_is_returned(value: bool) -> None:
    assert Flag().check("dynamic", value) is value


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_what_is_neither_true_nor_false_is_no_flag(value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        Flag().check("dynamic", value)
    assert str(caught.value) == f"dynamic: expected True or False, found {value!r}"
