"""Containers as they are: classes of a library's own may make something of an entry that is read."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

from biofx.unasked import is_of


def content_of(container: Any) -> list[Any]:
    """Return what is in a container of Python's, or in one derived from it; of a dict the items."""
    if is_of(container, dict):
        return list(dict.items(container))
    return list(_kind_of(container).__iter__(container))


def fill_again(container: Any, content: list[Any]) -> None:
    """Put back what was in a container, unless that is what is in it."""
    found = content_of(container)
    pairs = zip(found, content, strict=False)
    if len(found) == len(content) and all(_is_the_same(*pair) for pair in pairs):
        return
    kind = _kind_of(container)
    kind.clear(container)
    if is_of(container, dict):
        for key, value in content:
            kind.__setitem__(container, key, value)
    elif is_of(container, set):
        kind.update(container, content)
    else:
        kind.extend(container, content)


def _kind_of(container: Any) -> Any:
    """Return the class of Python's that a container is of."""
    kinds = (OrderedDict, dict, list, tuple, set, frozenset, deque)
    return next(kind for kind in kinds if is_of(container, kind))


def _is_the_same(found: Any, before: Any) -> bool:
    if isinstance(found, tuple) and isinstance(before, tuple) and len(found) == len(before) == 2:
        return found[0] is before[0] and found[1] is before[1]
    return found is before
