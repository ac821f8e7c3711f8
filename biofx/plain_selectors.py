"""Selectors as messages show them, and as files contain them: plain values.

A selector is its text, a list of them, or for a predicate ``{"nodes": [...], "predicate": name}``: what it
picked, since a file carries no code.
"""

from __future__ import annotations

from typing import Any

from biofx.select import Candidate, Pattern, Selector, show_pattern


class NamedNodes:
    """A predicate that picks nodes by name, as a user's predicate is stored in a file."""

    def __init__(self, names: frozenset[str], predicate: str) -> None:
        self.names = names
        self.__qualname__ = predicate

    def __call__(self, candidate: Candidate) -> bool:
        """Whether the node is one of them."""
        return candidate.name in self.names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedNodes) and self.names == other.names

    def __hash__(self) -> int:
        return hash(self.names)


def show_selector(selector: Selector) -> str:
    """Return a selector for a message.

    >>> show_selector(("layer4.*", "fc"))
    "'layer4.*', 'fc'"
    """
    patterns: Any = selector if isinstance(selector, (list, tuple)) else (selector,)
    return ", ".join(map(show_pattern, patterns))


def selector_to_plain(selector: Any) -> Any:
    """Return a selector in plain values; of a predicate that does not know what it picked, no node."""
    if isinstance(selector, str):
        return selector
    if isinstance(selector, (list, tuple)):
        return [selector_to_plain(pattern) for pattern in selector]
    picked = getattr(selector, "picked", getattr(selector, "names", ()))
    return {"nodes": sorted(picked), "predicate": called(selector)}


def selector_from_plain(plain: Any) -> Any:
    """Return the selector that :func:`selector_to_plain` wrote down.

    Raises:
        KeyError: it did not.
    """
    if isinstance(plain, str):
        return plain
    if isinstance(plain, list):
        return tuple(selector_from_plain(pattern) for pattern in plain)
    return NamedNodes(frozenset(plain["nodes"]), str(plain["predicate"]))


def called(predicate: Pattern) -> str:
    """Return the name of a predicate."""
    return str(getattr(predicate, "__qualname__", type(predicate).__name__))
