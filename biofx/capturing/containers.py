"""Containers as they are: classes of a library's own may make something of an entry that is read."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any


def content_of(container: Any) -> list[Any]:
    """Return what is in a dict, a list, a set or a deque; of a dict the items."""
    return list(dict.items(container) if isinstance(container, dict) else container)


def fill_again(container: Any, content: list[Any]) -> None:
    """Put back what was in a container, unless that is what is in it."""
    found = content_of(container)
    pairs = zip(found, content, strict=False)
    if len(found) == len(content) and all(_is_the_same(*pair) for pair in pairs):
        return
    if isinstance(container, dict):
        plain: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        plain.clear(container)
        for key, value in content:
            plain.__setitem__(container, key, value)
        return
    container.clear()
    (container.update if isinstance(container, set) else container.extend)(content)


def _is_the_same(found: Any, before: Any) -> bool:
    if isinstance(found, tuple) and isinstance(before, tuple) and len(found) == len(before) == 2:
        return found[0] is before[0] and found[1] is before[1]
    return found is before
