"""Lengths and ranges while a forward is captured, and modules that take several arguments."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx


class DividesByLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) / len(x)


class Masked(nn.Conv1d):
    def forward(self, x: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x * mask)


class CallsMasked(nn.Module):
    """Stays in Python, for it decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = Masked(2, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.masked(x, x.sign()) if x.sum() > -1e9 else x


@pytest.mark.parametrize("recorded", [False, True])
def test_a_length_is_part_of_the_graph_and_that_of_another_batch_is_another(recorded: bool) -> None:
    model = DividesByLength()
    given: Any = {"example_inputs": ((torch.ones(2, 4),), {})} if recorded else {}
    captured = biofx.capture(model, **given)
    assert captured.graph_breaks == {}
    torch.testing.assert_close(captured(torch.ones(5, 4)), model(torch.ones(5, 4)), rtol=0, atol=0)
    assert "len" not in vars(sys.modules[__name__])


def test_a_module_called_from_python_with_several_arguments_is_a_region() -> None:
    model, x = CallsMasked(), torch.randn(2, 2, 5)
    captured = biofx.capture(model)
    assert list(captured.graph_breaks) == [""]
    assert captured.region_paths == ("masked",)
    torch.testing.assert_close(captured(x), model(x), rtol=0, atol=0)
