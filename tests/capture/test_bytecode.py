from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from biofx.capture.bytecode import ANYTHING, names_mentioned, weights_mentioned


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.weight = nn.Linear(2, 2), nn.Parameter()

    def forward(self, x: Tensor) -> Any:
        return [self._inner(x) for _ in range(2)], self.weight

    def _inner(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)

    def elsewhere(self) -> Any:
        other: Any = self.other
        return other.weight, self.other.weight.shape  # type: ignore[union-attr]


class Delegates(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return project(getattr(self, "late"), x)  # noqa: B009


class Calls(nn.Module):
    fc: Any

    def forward(self, x: Tensor) -> Any:
        return self.fc(x)


def test_weights_that_a_forward_reads_are_found_by_the_name_of_their_layer() -> None:
    assert weights_mentioned(Reads) == {"fc"}
    assert weights_mentioned(Delegates) == {ANYTHING}
    assert weights_mentioned(Calls) == frozenset()
    assert weights_mentioned(nn.Linear) == frozenset()


def test_names_reach_through_methods_functions_and_texts() -> None:
    assert {"_inner", "fc", "weight", "linear"} <= names_mentioned(Reads)
    assert "other" not in names_mentioned(Reads)
    assert {"project", "late"} <= names_mentioned(Delegates)


def test_weights_are_mentioned_behind_decorators_and_not_where_their_type_alone_is_read() -> None:
    def wrapped(function: Any) -> Any:
        @functools.wraps(function)
        def around(*args: Any) -> Any:
            return function(*args)

        return around

    class Reads(nn.Module):
        @wrapped
        @wrapped
        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.first.weight.dtype)  # type: ignore[union-attr, arg-type]
            return F.linear(x, self.second.weight)  # type: ignore[union-attr, arg-type]

    assert weights_mentioned(Reads) == {"second"}
