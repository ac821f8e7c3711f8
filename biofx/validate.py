"""Checks of option values: one error that names the option, what was found and what is permitted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from biofx.errors import OptionError, suggest


@dataclass(frozen=True)
class Range:
    """The values a number may take."""

    low: float
    high: float = math.inf
    low_open: bool = False
    whole: bool = False

    def check(self, name: str, value: Any) -> Any:
        """Return the value, a float unless it must be whole.

        Raises:
            OptionError: it is no number or lies outside.
        """
        kinds = int if self.whole else (int, float)
        number = value if isinstance(value, kinds) and not isinstance(value, bool) else math.nan
        if not self.whole:
            try:
                number = float(number)
            except OverflowError:
                number = math.inf
        inside = self.low <= number <= self.high and not (self.low_open and number == self.low)
        if not inside or number == math.inf:
            raise OptionError(f"{name}: expected {self}, found {value!r}")
        return number

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        opening, closing = "(" if self.low_open else "[", ")" if math.isinf(self.high) else "]"
        return f"{kind} in {opening}{self.low}, {self.high}{closing}"


POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0)
FRACTION = Range(0, 1)
COUNT = Range(0, whole=True)
SEED = Range(0, 2**63 - 1, whole=True)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return the value, an enum member as its text.

    Raises:
        OptionError: it is none of the choices; the nearest is named.
    """
    text = value.value if isinstance(value, Enum) else value
    if not isinstance(text, str) or text not in choices:
        hint = suggest(str(text), choices)
        raise OptionError(f"{name}: expected one of {', '.join(choices)}, found {value!r}{hint}")
    return text


def check_flag(name: str, value: Any) -> bool:
    """Return the value.

    Raises:
        OptionError: it is neither True nor False.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{name}: expected True or False, found {value!r}")
    return value


def check_signs(name: str, value: Any) -> tuple[int, ...] | None:
    """Return signs as a tuple of +1 and -1, or None.

    Raises:
        OptionError: it is neither None nor a sequence of +1 and -1.
    """
    if value is None:
        return None
    entries = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if not entries or any(isinstance(entry, bool) or entry not in (1, -1) for entry in entries):
        raise OptionError(f"{name}: expected a list of 1 and -1, one for each output, found {value!r}")
    return tuple(int(entry) for entry in entries)


def check_bounds(low_name: str, low: float, high_name: str, high: float) -> None:
    """Check that two bounds of a factor enclose 1.

    Raises:
        OptionError: they do not.
    """
    if not low <= 1 <= high:
        raise OptionError(
            f"{low_name} and {high_name}: expected {low_name} <= 1 <= {high_name}, found {low!r}, {high!r}; "
            "the factors scatter around 1"
        )
