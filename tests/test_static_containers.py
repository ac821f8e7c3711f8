"""Containers of a library's own, which make something of what is read from them."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import pytest

from biofx.static_inspection import content_of, restore_content


class MakesEntries(OrderedDict[str, Any]):
    """Gives a new object for each reading."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


def test_a_dict_that_makes_its_entries_keeps_what_they_are_made_of() -> None:
    container = MakesEntries(number=int, text=str)
    content = content_of(container)
    assert content == [("number", int), ("text", str)]
    container["number"] = float
    container["other"] = list
    restore_content(container, content)
    assert list(dict.items(container)) == [("number", int), ("text", str)]
    assert container["number"] == 0


@pytest.mark.parametrize("container", [[1, 2], {1, 2}, deque([1, 2], maxlen=2), {1: 2}])
def test_a_container_gets_back_what_was_in_it(container: Any) -> None:
    content, before = content_of(container), type(container)(container)
    container.clear()
    restore_content(container, content)
    assert container == before
