"""Passes as text, and the text read back.

    split-weights{gamma=2,only=[layer1.*,"fc"]},constrain-signs,scale-gradients{nu=0.16,@"layer4.*"{nu=0.3}}

A pass is its name, then in braces the options that differ from their defaults. ``@selector{…}`` holds
options for what the selector picks. Items may be grouped in parentheses, with ``only`` and ``exclude``
behind: ``(split-weights{gamma=2},scale-gradients){only="layer1"}``. A value is a number, ``true``,
``false``, ``none``, a bare word, a text in double quotes, or a list in brackets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from biofx.callables import callable_to_text
from biofx.errors import OptionError, PipelineError

_BARE_WORD = re.compile(r"[A-Za-z_*?][\w.*?#-]*")
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>"(?:[^"\\]|\\.)*")
      | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.*?]))
      | (?P<word>[\w*?][\w.*?\#-]*)
      | (?P<sign>[{}()\[\],=@])
    )""",
    re.VERBOSE,
)
_CONSTANTS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class ParsedItem:
    """One pass, or one group of them, as written."""

    name: str | None
    """The pass's name, None for a group."""
    options: dict[str, Any]
    overrides: tuple[tuple[Any, dict[str, Any]], ...]
    members: tuple[ParsedItem, ...] = ()


def format_item(name: str, options: dict[str, Any], overrides: list[tuple[Any, dict[str, Any]]]) -> str:
    """Return a pass, or a parenthesised group, with its options as text."""
    entries = [f"{key}={format_value(value)}" for key, value in options.items()]
    for selector, changed in overrides:
        inner = ",".join(f"{key}={format_value(value)}" for key, value in changed.items())
        entries.append(f"@{format_value(selector)}{{{inner}}}")
    return f"{name}{{{','.join(entries)}}}" if entries else name


def format_value(value: Any) -> str:
    """Return one option's value as text; what no text can carry shows as ``<…>``, which does not parse."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        plain = _BARE_WORD.fullmatch(value) and value not in _CONSTANTS
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, (tuple, list)):
        return f"[{','.join(format_value(entry) for entry in value)}]"
    try:
        return format_value(callable_to_text(value))
    except OptionError:
        return f"<{getattr(value, '__qualname__', type(value).__name__).rpartition('.')[2].strip('<>')}>"


def parse_items(text: str) -> tuple[ParsedItem, ...]:
    """Read a pipeline's text.

    Raises:
        PipelineError: it is malformed; the message shows where.
    """
    try:
        return _Reader(text).items(end=None)
    except RecursionError:
        raise PipelineError(f"malformed pipeline text: nested too deeply, {text[:20]!r}…") from None


def parse_value(text: str) -> Any:
    """Read one value of an option; a text that is none is returned unchanged.

    >>> parse_value("0.5"), parse_value("true"), parse_value("torch.tanh"), parse_value("a b")
    (0.5, True, 'torch.tanh', 'a b')
    """
    try:
        reader = _Reader(text)
        return reader.whole_value()
    except (PipelineError, RecursionError):
        return text


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[tuple[str, str, int]] = []
        self._next = 0
        place = 0
        stripped = text.rstrip()
        while place < len(stripped):
            match = _TOKEN.match(stripped, place)
            if match is None:
                raise self._error("something readable", place)
            kind = str(match.lastgroup)
            self._tokens.append((kind, match.group(kind), match.start(kind)))
            place = match.end()

    def items(self, end: str | None) -> tuple[ParsedItem, ...]:
        found: list[ParsedItem] = []
        if self._at_end(end):
            return ()
        while True:
            found.append(self._item())
            if self._at_end(end):
                return tuple(found)
            self._expect(",", "',' between passes" if end is None else f"',' or '{end}'")

    def whole_value(self) -> Any:
        value = self._value()
        if not self._at_end(None):
            raise self._error("nothing more")
        return value

    def _item(self) -> ParsedItem:
        if self._accept("("):
            members = self.items(end=")")
            options, overrides = self._braces()
            return ParsedItem(None, options, overrides, members)
        name = self._word("the name of a pass")
        options, overrides = self._braces()
        return ParsedItem(name, options, overrides)

    def _braces(self) -> tuple[dict[str, Any], tuple[tuple[Any, dict[str, Any]], ...]]:
        options: dict[str, Any] = {}
        overrides: list[tuple[Any, dict[str, Any]]] = []
        if not self._accept("{"):
            return options, ()
        while not self._accept("}"):
            if options or overrides:
                self._expect(",", "',' or '}'")
            if self._accept("@"):
                selector = self._value()
                inner, nested = self._braces()
                if nested or not inner:
                    raise self._error("option=value in the braces of an override")
                overrides.append((selector, inner))
                continue
            key = self._word("an option's name")
            if key in options:
                raise self._error(f"option {key!r} only once")
            self._expect("=", f"'=' after {key!r}")
            options[key] = self._value()
        return options, tuple(overrides)

    def _value(self) -> Any:
        if self._accept("["):
            entries: list[Any] = []
            while not self._accept("]"):
                if entries:
                    self._expect(",", "',' or ']'")
                entries.append(self._value())
            return tuple(entries)
        if self._next >= len(self._tokens):
            raise self._error("a value")
        kind, token, place = self._tokens[self._next]
        readers: dict[str, Callable[[str], Any]] = {
            "text": json.loads,
            "number": lambda number: float(number) if set(number) & set(".eE") else int(number),
            "word": lambda word: _CONSTANTS.get(word, word),
        }
        if kind not in readers:
            raise self._error("a value", place)
        self._next += 1
        try:
            return readers[kind](token)
        except ValueError:
            raise self._error("a text in double quotes with JSON's escapes", place) from None

    def _word(self, what: str) -> str:
        if self._next < len(self._tokens) and self._tokens[self._next][0] == "word":
            self._next += 1
            return self._tokens[self._next - 1][1]
        raise self._error(what)

    def _accept(self, sign: str) -> bool:
        found = self._next < len(self._tokens) and self._tokens[self._next][:2] == ("sign", sign)
        self._next += found
        return found

    def _expect(self, sign: str, what: str) -> None:
        if not self._accept(sign):
            raise self._error(what)

    def _at_end(self, end: str | None) -> bool:
        return self._next == len(self._tokens) if end is None else self._accept(end)

    def _error(self, expected: str, place: int | None = None) -> PipelineError:
        if place is None:
            place = self._tokens[self._next][2] if self._next < len(self._tokens) else len(self._text)
        found = repr(self._text[place : place + 20]) if place < len(self._text) else "the end"
        return PipelineError(
            f"malformed pipeline text {self._text!r}: expected {expected} at {place}, found {found}"
        )
