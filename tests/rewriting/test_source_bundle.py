from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biofx import BioConfig
from biofx.errors import InputError
from biofx.rewriting.source_bundle import SourceBundle

SCALE = torch.tensor([2.0, 3.0])
relu = 5.0  # an attribute of another name must not bring it along


def scaled(x: Tensor) -> Tensor:
    return helper(x) * SCALE


def helper(x: Tensor) -> Tensor:
    SHADOW = F.relu(x)  # noqa: N806
    return SHADOW + math.pi


SHADOW = random.Random()


@dataclass(frozen=True)
class Doubling:
    """A class of the user's, with a decorator and a base that come along."""

    by: float = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return scaled(x) * self.by


def makes_one(x: Tensor) -> Tensor:
    return Doubling(by=3.0)(x)


def outer(offset: float) -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor) -> Tensor:
        return x + offset

    return inner


def factorial(n: int) -> int:
    return n * factorial(n - 1) if n else 1


class Local:
    pass


LOCAL = Local()


def uses_an_object_of_a_local_class() -> Any:
    return LOCAL


def run(bundle: SourceBundle, name: str) -> Any:
    """Run the carried source as a script would: with nothing but the values around it."""
    namespace: dict[str, Any] = dict(bundle.values) | {"__name__": "elsewhere"}
    exec(compile(bundle.source, "carried", "exec", dont_inherit=True), namespace)
    return namespace[name]


X = torch.tensor([-1.0, 1.0])


@pytest.mark.parametrize("function", [scaled, makes_one, outer(4.0)])
def test_a_function_does_the_same_elsewhere(function: Callable[[Tensor], Tensor]) -> None:
    bundle = SourceBundle()
    name = bundle.add(function, "asked")
    assert name == "asked"
    assert torch.equal(run(bundle, name)(X), function(X))
    assert not {"SHADOW", "relu"} & set(bundle.values)


def test_a_lambda_is_cut_out_of_its_line() -> None:
    pairs = {"a": lambda x: x + SCALE, "b": 1}
    bundle = SourceBundle()
    assert torch.equal(run(bundle, bundle.add(pairs["a"], "asked"))(X), X + SCALE)
    first, second = lambda x: x, lambda x: -x
    for function in (first, second):
        with pytest.raises(InputError, match="write a def"):
            SourceBundle().add(function, "asked")


def test_a_function_that_calls_itself_comes_along_once() -> None:
    bundle = SourceBundle()
    assert run(bundle, bundle.add(factorial, "predicate"))(5) == 120
    assert bundle.source.count("def factorial") == 1


def test_what_is_installed_is_imported() -> None:
    bundle = SourceBundle()
    assert bundle.add(torch.nn.functional.relu) == "relu"
    assert bundle.add(BioConfig) == "BioConfig"
    assert bundle.source.splitlines() == [
        "from biofx.config import BioConfig",
        "from torch.nn.functional import relu",
    ]


def test_what_cannot_come_along_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"holds a Local of .*test_source_bundle; make it inside"):
        SourceBundle().add(uses_an_object_of_a_local_class)
    with pytest.raises(InputError, match="cannot be found"):
        SourceBundle().add(eval("lambda x: x"), "asked")
    bundle = SourceBundle()
    bundle.add(outer(1.0), "one")
    with pytest.raises(InputError, match="mean different things by 'offset'"):
        bundle.add(outer(2.0), "two")
    with pytest.raises(InputError, match="cannot be imported by its name"):
        SourceBundle().add(nn.Linear.forward)


def test_a_partial_is_a_value() -> None:
    bundle = SourceBundle()
    assert bundle.add_value("part", functools.partial(torch.add, 1)) == "part"
    assert set(bundle.values) == {"part"}
