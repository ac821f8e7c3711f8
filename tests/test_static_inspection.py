"""Objects of anybody's that a model holds, none of whose methods is to run."""

from __future__ import annotations

import enum
import functools
import logging
import threading
import types
import typing
import weakref
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.static_inspection import (
    attributes_of,
    bytes_of,
    content_of,
    is_of,
    is_of_a_library,
    restore_content,
)

OFF = {"fuzzy_lr_distribution": "baseline"}


def refuses(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("asked")


def returns_itself(self: Any, memo: Any) -> Any:
    return self


SILENT = {
    **dict.fromkeys(
        (
            *(
                "__eq__",
                "__ne__",
                "__len__",
                "__iter__",
                "__bool__",
                "__getitem__",
                "__contains__",
                "__hash__",
            ),
            *("copy", "keys", "values", "items", "update", "clear", "extend", "get", "tobytes", "__repr__"),
        ),
        refuses,
    ),
    "__deepcopy__": returns_itself,
}
Meta = type("Meta", (type,), {"__eq__": refuses, "__hash__": refuses, "__getattr__": refuses})
Silent: Any = type("Silent", (), {**SILENT, "attribute": property(refuses)})
SilentDict: Any = type("SilentDict", (dict,), SILENT)
SilentList: Any = type("SilentList", (list,), SILENT)
Disguised: Any = type(
    "Disguised", (), {"__class__": property(lambda self: dict), "__dict__": property(refuses)} | SILENT
)


class Colour(enum.Enum):
    RED = 1


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(500):
        found = [found]
    return found


OBJECTS: dict[str, Any] = {
    "silent": Silent(),
    "silent dict": SilentDict(a=1),
    "silent list": SilentList([1]),
    "disguised": Disguised(),
    "of an odd class": Meta("OfMeta", (), {})(),
    "an odd class": Meta("OfMeta", (), {}),
    "a member": Colour.RED,
    "an enum": Colour,
    "a logger": logging.getLogger("model"),
    "a lock": threading.Lock(),
    "a thread": threading.Thread(target=print),
    "a weak reference": weakref.ref(Colour),
    "a generator": (i for i in range(3)),
    "a path": Path("x"),
    "a mock": mock.MagicMock(),
    "a mock of a tensor": mock.Mock(spec=Tensor),
    "numpy": numpy,
    "an alias": numpy.ndarray[Any, numpy.dtype[numpy.float32]],
    "an array": numpy.array([object()], dtype=object),
    "typing": typing.Optional[int],  # noqa: UP045
    "a variable of types": typing.TypeVar("T"),
    "a partial": functools.partial(torch.add, 1),
    "a proxy": types.MappingProxyType({1: 2}),
    "a counter": Counter("ab"),
    "deep": deep(),
    "inside": {"a": [Silent(), {Colour.RED: (SilentDict(a=1), numpy)}]},
}
SHARED: Any = None


class Holds(nn.Module):
    """Reads a global, and has an attribute."""

    held: Any

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        vars(self)["held"] = held

    def forward(self, x: Tensor) -> Any:
        SHARED  # noqa: B018
        return self.fc(x)


@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
@pytest.mark.parametrize("name", OBJECTS)
def test_what_globals_and_classes_hold_is_not_asked(
    name: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    held = OBJECTS[name]
    monkeypatch.setitem(globals(), "SHARED", {"held": held, "all": [held]})
    model: Any = type("Model", (Holds,), {"shared": held, "inside": [held]})(None)
    for _ in range(2):  # what the first finds may be there at the second
        bio_model, _ = biofx.transform(model, OFF, example_inputs=x if recorded else None)
        assert torch.equal(bio_model(x), model(x))
        assert bio_model.graph_breaks == {}


CANNOT_BE_COPIED = {
    *("a lock", "a thread", "a generator", "a proxy", "deep", "inside"),
    *("of an odd class", "an odd class"),
}


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - CANNOT_BE_COPIED))
def test_what_a_module_holds_is_not_asked(name: str) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = Holds(OBJECTS[name])
    bio_model, _ = biofx.transform(model, OFF)
    assert torch.equal(bio_model(x), model(x))


def test_what_cannot_be_copied_is_named() -> None:
    with pytest.raises(biofx.errors.InputError, match=r"attribute '1\.held' \(lock\) makes it fail"):
        biofx.transform(nn.Sequential(nn.Linear(4, 4), Holds(threading.Lock())))


class Counts:
    def __init__(self) -> None:
        self.calls = 0


COUNTS = Counts()


class CountsItself(Holds):
    def forward(self, x: Tensor) -> Any:
        self.held.calls += 1
        return self.fc(x) * self.held.calls


class CountsElsewhere(Holds):
    def forward(self, x: Tensor) -> Any:
        COUNTS.calls += 1
        return self.fc(x)


@pytest.mark.parametrize("held", [Counts(), types.SimpleNamespace(calls=0)], ids=["own", "namespace"])
@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
def test_an_object_that_a_forward_changes_is_as_it_was_and_goes_on_being_changed(
    held: Any, recorded: bool
) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = CountsItself(held)
    bio_model, _ = biofx.transform(model, OFF, example_inputs=x if recorded else None)
    assert held.calls == 0
    for calls in (1, 2):
        torch.testing.assert_close(bio_model(x), model.fc(x) * calls)
        assert bio_model.held.calls == calls


def test_an_object_of_everybodys_that_a_forward_changes_goes_on_being_changed() -> None:
    COUNTS.calls = 0
    bio_model, _ = biofx.transform(CountsElsewhere(None), OFF)
    assert COUNTS.calls == 0
    bio_model(torch.ones(1, 4))
    assert COUNTS.calls == 1


def test_what_is_found_without_asking() -> None:
    assert is_of(SilentDict(), dict)
    assert not is_of(Disguised(), dict)
    assert attributes_of(types.SimpleNamespace(a=1)) == {"a": 1}
    assert attributes_of(Disguised()) == {} == attributes_of(1)
    assert attributes_of(types) is vars(types)
    assert bytes_of(numpy.zeros(2, dtype=numpy.uint8)) == b"\0\0"
    assert bytes_of(bytearray(b"ab")) == b"ab"
    assert bytes_of(Silent()) is None


def test_objects_of_libraries_are_told_from_those_of_the_user() -> None:
    none: frozenset[str] = frozenset()
    for held in (logging.getLogger("x"), numpy, int, numpy.zeros(1), Path("x")):
        assert is_of_a_library(held, none)
    of_the_user: list[Any] = [Counts(), Silent(), types.SimpleNamespace(), [], "text"]
    assert not any(is_of_a_library(held, none) for held in of_the_user)
    assert not is_of_a_library(numpy.zeros(1), frozenset({"numpy"}))


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
