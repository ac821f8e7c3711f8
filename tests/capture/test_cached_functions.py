"""Functions that remember what they returned, called by a forward."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx

OFF = {"fuzzy_lr_distribution": "baseline"}


@functools.lru_cache
def ramp(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32)


@functools.lru_cache
def noise(size: int) -> Tensor:
    return torch.rand(size)


class Ramp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) + ramp(4) + noise(4)


class RampAsLongAsItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @functools.lru_cache  # noqa: B019
    def table(self, size: int) -> Tensor:
        return torch.ones(size, 1) * 2

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * ramp(x.shape[0])[:, None] + self.table(x.shape[0])


@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
@pytest.mark.parametrize("kind", [Ramp, RampAsLongAsItsInput])
def test_a_capture_leaves_no_stand_in_in_a_memory(kind: type[nn.Module], recorded: bool) -> None:
    ramp.cache_clear()
    noise.cache_clear()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = kind()
    bio_model, _ = biofx.transform(model, OFF, example_inputs=x if recorded else None)
    for size in (4, 3, 5):
        assert type(ramp(size)) is Tensor
        assert torch.equal(ramp(size), torch.arange(float(size)))
    for given in (x, x[:1], x.repeat(3, 1)):
        assert torch.equal(bio_model(given), model(given))
    assert ramp.cache_info().currsize >= 3


def test_what_depends_on_a_size_is_part_of_the_graph() -> None:
    captured = biofx.capture(RampAsLongAsItsInput(), example_inputs=torch.ones(3, 4))
    assert captured.graph_breaks == {}
    assert type(vars(RampAsLongAsItsInput)["table"]) is type(ramp)
