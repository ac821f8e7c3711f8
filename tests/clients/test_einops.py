"""Models that rearrange with einops."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import biofx

einops: Any = pytest.importorskip("einops")
OFF = {"fuzzy_lr_distribution": "baseline"}


class Heads(nn.Module):
    hint = numpy.ndarray[Any, numpy.dtype[numpy.float32]]

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        heads = einops.rearrange(self.fc(x), "b (h d) -> b h d", h=2)
        twice = einops.repeat(heads, "b h d -> b k h d", k=2)
        mean = einops.reduce(twice, "b k h d -> b h d", "mean")
        return self.out(einops.rearrange(mean, "b h d -> b (h d)"))


@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
def test_a_model_that_rearranges_is_the_same_at_every_size_and_every_turn(recorded: bool) -> None:
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    model = Heads()
    for _ in range(2):
        bio_model, _ = biofx.transform(model, OFF, example_inputs=x[:3] if recorded else None)
        for size in (1, 2, 3, 7):
            torch.testing.assert_close(bio_model(x[:size]), model(x[:size]))


def test_what_it_does_with_sizes_is_part_of_the_graph_when_recorded() -> None:
    captured = biofx.capture(Heads(), example_inputs=torch.ones(3, 4))
    assert captured.graph_breaks == {}
    functions = {node.target for node in captured.graph.nodes if node.op == "call_method"}
    assert "reshape" in functions


def test_a_layer_of_einops_is_one_of_the_models() -> None:
    from einops.layers.torch import Rearrange

    model = nn.Sequential(nn.Linear(4, 4), Rearrange("b (h d) -> (b h) d", h=2), nn.Linear(2, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for example in (None, x):
        bio_model, _ = biofx.transform(model, OFF, example_inputs=example)
        assert torch.equal(bio_model(x), model(x))
