"""What an option is: its default, the values it may take, what it means, and which passes read it.

A field of :class:`biofx.BioConfig` declares all of that once; validation, files, the command line, the fields
of the passes and the documentation read the declaration.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

from biofx.callables import check_activation
from biofx.errors import OptionError, suggest

T = TypeVar("T")


class Check(Protocol):
    """The values that an option may take; its text says which."""

    def check(self, name: str, value: Any) -> Any:
        """Return the value in the option's own type.

        Raises:
            OptionError: it is not permitted; the message has ``name``, the value and what is permitted.
        """


@dataclass(frozen=True)
class Range:
    """Numbers in an interval."""

    low: float
    high: float = math.inf
    low_open: bool = False
    whole: bool = False

    def check(self, name: str, value: Any) -> Any:
        """Return the value, a float unless it must be whole."""
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
SHARE = Range(0, 1, low_open=True)
COUNT = Range(0, whole=True)
SEED = Range(0, 2**63 - 1, whole=True)


@dataclass(frozen=True)
class Choice:
    """One of several texts, or members of an enum, which may be given by their texts."""

    choices: Sequence[Any]
    removed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Texts that older versions permitted, and what to take instead."""

    def check(self, name: str, value: Any) -> Any:
        """Return the value, a member where the choices are members."""
        known = {_text(choice): choice for choice in self.choices}
        text = _text(value)
        if not isinstance(text, str) or text not in known:
            removed = isinstance(text, str) and text in self.removed
            hint = f", which was removed; {self.removed[text]}" if removed else suggest(str(text), known)
            raise OptionError(f"{name}: expected one of {', '.join(known)}, found {value!r}{hint}")
        return known[text]

    def __str__(self) -> str:
        return f"one of {', '.join(_text(choice) for choice in self.choices)}"


def _text(choice: Any) -> Any:
    return choice.value if isinstance(choice, Enum) else choice


class Flag:
    """True or False."""

    def check(self, name: str, value: Any) -> bool:
        """Return the value."""
        if not isinstance(value, bool):
            raise OptionError(f"{name}: expected {self}, found {value!r}")
        return value

    def __str__(self) -> str:
        return "True or False"


class Signs:
    """A sequence of +1 and -1."""

    def check(self, name: str, value: Any) -> tuple[int, ...]:
        """Return the signs as a tuple."""
        entries = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
        if not entries or any(isinstance(entry, bool) or entry not in (1, -1) for entry in entries):
            raise OptionError(f"{name}: expected {self}, found {value!r}")
        return tuple(int(entry) for entry in entries)

    def __str__(self) -> str:
        return "a list of 1 and -1, one for each output"


class Sizes:
    """Counts of units, one for each area; or two lists of them, of postsynaptic and of presynaptic areas."""

    def check(self, name: str, value: Any) -> tuple[Any, ...]:
        """Return the counts as a tuple, or a pair of tuples."""
        entries = _entries(value)
        inner = [_entries(entry) for entry in entries or ()]
        is_pair = bool(inner) and all(inner)
        sizes = [size for row in inner for size in row or ()] if is_pair else entries or ()
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
        if not sizes or not whole or (is_pair and len(inner) != 2):
            raise OptionError(f"{name}: expected {self}, found {value!r}")
        return tuple(tuple(row or ()) for row in inner) if is_pair else tuple(sizes)

    def __str__(self) -> str:
        return "a list of whole numbers above 0, or two such lists"


class Fractions:
    """A matrix of fractions."""

    def check(self, name: str, value: Any) -> tuple[tuple[float, ...], ...]:
        """Return the rows as tuples of floats."""
        rows = [_entries(row) or () for row in _entries(value) or ()]
        try:
            made = tuple(tuple(FRACTION.check(name, entry) for entry in row) for row in rows)
        except OptionError:
            made = ()
        if len({len(row) for row in made}) != 1 or not made[0]:
            raise OptionError(f"{name}: expected {self}, found {value!r}")
        return made

    def __str__(self) -> str:
        return "a list of rows of equal length, of numbers in [0, 1]"


class MaskRows:
    """Rows of 0 and 1: a text, a tensor, an array or lists; further axes are flattened behind the rows."""

    def check(self, name: str, value: Any) -> str:
        """Return the rows as one text, with a space between two."""
        try:
            if isinstance(value, str):
                rows = value.split()
            else:
                plain = value.tolist() if hasattr(value, "tolist") else value
                rows = ["".join(_digits(row)) for row in plain]
        except TypeError:
            rows = []
        if not rows or len({len(row) for row in rows}) != 1 or not rows[0] or set("".join(rows)) - {"0", "1"}:
            shown = f"a {type(value).__name__} of others" if hasattr(value, "tolist") else repr(value)
            raise OptionError(f"{name}: expected {self}, found {shown}")
        return " ".join(rows)

    def __str__(self) -> str:
        return "rows of 0 and 1 of equal length: a text ('110 011'), lists or a tensor"


def _entries(value: Any) -> list[Any] | None:
    """Return what a list, a tuple, a tensor or an array holds; None for anything else."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return list(plain) if isinstance(plain, (list, tuple)) else None


def _digits(entry: Any) -> Iterator[str]:
    """Yield the entries of lists in lists as 0 and 1; what is neither comes out as it is."""
    if isinstance(entry, (list, tuple)):
        for inner in entry:
            yield from _digits(inner)
    else:
        yield str(int(entry)) if entry in (0, 1) else "?"


class Activation:
    """A callable from a tensor to one of the same shape, or the text that names one."""

    def check(self, name: str, value: Any) -> Callable[..., Any]:
        """Return the callable."""
        return check_activation(name, value)

    def __str__(self) -> str:
        return "a callable, or the name of one"


@dataclass(frozen=True)
class OrNone:
    """The same values, or None; a text says ``"none"``."""

    inner: Check

    def check(self, name: str, value: Any) -> Any:
        """Return the value, None for ``"none"``."""
        is_none = value is None or (isinstance(value, str) and value == "none")
        return None if is_none else self.inner.check(name, value)

    def __str__(self) -> str:
        return f"{self.inner}, or None"


@dataclass(frozen=True)
class Feeds:
    """What a field of the config means to one pass."""

    option: str
    """What the pass calls it."""
    translate: Callable[[Any], Any] = lambda value: value
    """From the field's value to the option's."""


@dataclass(frozen=True)
class AtRule:
    """What a field of the config is to a rule of plasticity, for which an entry of a schedule may give it."""

    option: str
    """What the rule calls it."""
    shapes: Callable[[Any], Any] | None = None
    """From its value to what follows from it in the model itself, which an entry cannot change; None for
    nothing."""
    lasts: bool = False
    """Whether it is read between two runs too, so that all entries of the rule give a weight the same."""


def _itself(value: Any) -> Any:
    return value


def decided_at_transform(option: str, shapes: Callable[[Any], Any] = _itself) -> AtRule:
    """Return what a field is to a rule that reads it and cannot change it, or not what follows from it."""
    return AtRule(option, shapes)


@dataclass(frozen=True)
class Option:
    """What a field of a config or of a pass declares."""

    permitted: Check
    doc: str
    """Meaning and unit, in plain text with markup of docstrings."""
    feeds: Mapping[str, Feeds] = dataclasses.field(default_factory=dict)
    """The passes that read a field of the config, by name."""
    off: Mapping[str, Callable[[Any], bool]] = dataclasses.field(default_factory=dict)
    """The passes that some values of the field switch off, by name, and whether a value does."""
    on: Mapping[str, Callable[[Any], bool]] = dataclasses.field(default_factory=dict)
    """The passes that some values of the field ask for, by name, and whether a value does; a pass that some
    field asks for is off without that."""
    per_layer: bool = True
    """Whether it may differ between layers."""
    field: str = ""
    """For an option of a pass, the field of the config that it comes from."""
    rules: Mapping[str, AtRule] = dataclasses.field(default_factory=dict)
    """The rules of plasticity that read a field of the config, by name."""


def option(
    default: Any,
    permitted: Check,
    doc: str,
    *,
    feeds: Mapping[str, str | Feeds] | None = None,
    off: Mapping[str, Callable[[Any], bool]] | None = None,
    on: Mapping[str, Callable[[Any], bool]] | None = None,
    per_layer: bool = True,
    field: str = "",
    rules: Mapping[str, str | AtRule] | None = None,
) -> Any:
    """Return the field of a dataclass that declares an option; see :class:`Option`."""
    read = {
        name: given if isinstance(given, Feeds) else Feeds(given) for name, given in (feeds or {}).items()
    }
    at_rules = {
        name: given if isinstance(given, AtRule) else AtRule(given) for name, given in (rules or {}).items()
    }
    said = " ".join(doc.split())
    declared = Option(permitted, said, read, off or {}, on or {}, per_layer, field, at_rules)
    return dataclasses.field(default=default, metadata={"option": declared})


def declared_options(cls: type) -> dict[str, Option]:
    """Return what the fields of a dataclass declare, by name; fields that are no options are left out."""
    fields = dataclasses.fields(cls)
    return {field.name: field.metadata["option"] for field in fields if "option" in field.metadata}


def with_documented_options(cls: type[T]) -> type[T]:
    """Add the options that a dataclass declares to its docstring; a decorator."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    entries = [
        f"{name}: {declared.doc} Expected: {declared.permitted}; default: {_shown(defaults[name])}."
        f"{given_at_rules(declared)}"
        for name, declared in declared_options(cls).items()
    ]
    lines = [
        textwrap.fill(entry, 110, initial_indent=" " * 4, subsequent_indent=" " * 8) for entry in entries
    ]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines, ""])
    return cls


def given_at_rules(declared: Option) -> str:
    """Return how entries of a schedule give an option, as a sentence behind others; empty if none does."""
    given = [(rule, at_rule.option) for rule, at_rule in declared.rules.items() if at_rule.shapes is None]
    shown = ", ".join(f'Rule("{rule}", {name}=…)' for rule, name in given)
    return f" At a rule: {shown}." if shown else ""


def _shown(default: Any) -> str:
    return str(getattr(default, "__name__", None) or repr(_text(default)))
