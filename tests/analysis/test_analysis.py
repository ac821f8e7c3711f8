"""Long models are walked without recursion, and what is found grows as the model does."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.analysis.analysis import Analysis


class Deep(nn.Module):
    """A residual MLP of many layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


def test_long_models_do_not_recurse_and_what_is_found_grows_with_them() -> None:
    found = {}
    for depth in (100, 200, 800):
        analysis = Analysis.of(biofx.capture(Deep(depth)))
        pairs = sum(pair.shape[1] for pair in analysis._pairs)
        found[depth] = (len(analysis.sources), len(analysis.readings), pairs)
        assert len(analysis.readings) == depth
    for small, large in zip(found[100], found[200], strict=True):
        assert large <= 2 * small + 2
    for small, large in zip(found[100], found[800], strict=True):
        assert large <= 8 * small + 8
    assert found[800][1] * 2 > sys.getrecursionlimit()


def test_units_of_a_residual_chain_are_one() -> None:
    groups = biofx.unit_groups(biofx.capture(nn.Sequential(nn.Linear(3, 2), Deep(50), nn.Linear(2, 1))))
    first = groups.home_units(groups.made_by("0.weight")).tolist()
    for path in groups.producers()[:-1]:
        assert groups.home_units(groups.made_by(path)).tolist() == first
    (inputs, units) = groups
    assert (inputs.producers, inputs.units) == (("input_1",), 3)
    assert units.units == 2
    assert len(units.producers) == len(units.readers) == 51


def test_a_model_that_is_no_graph_is_refused() -> None:
    with pytest.raises(biofx.InputError, match="capture the model first"):
        biofx.unit_groups(nn.Linear(2, 2))  # type: ignore[arg-type]
