"""Long models are walked without recursion, and what is found grows as the model does."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.analysis.units import UnitAnalysis
from tests.analysis.nets import Net


class Deep(nn.Module):
    """A residual MLP of many layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


@pytest.fixture
def little_recursion() -> Iterator[None]:
    """Let Python call no deeper than a few hundred frames from here, whatever ran before."""
    before = sys.getrecursionlimit()
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    sys.setrecursionlimit(depth + 250)
    yield
    sys.setrecursionlimit(before)


def test_what_is_found_grows_with_the_model(request: pytest.FixtureRequest) -> None:
    models = {depth: biofx.capture(Deep(depth)) for depth in (100, 200, 800)}
    request.getfixturevalue("little_recursion")
    found = {}
    for depth, model in models.items():
        analysis = UnitAnalysis(model)
        pairs = sum(pair.shape[1] for pair in analysis.pairs)
        found[depth] = (len(analysis.sources), len(analysis.readings), pairs)
        assert len(analysis.readings) == depth
    for small, large in zip(found[100], found[200], strict=True):
        assert large <= 2 * small + 2
    for small, large in zip(found[100], found[800], strict=True):
        assert large <= 8 * small + 8


def test_a_long_sum_of_inputs_does_not_recurse(request: pytest.FixtureRequest) -> None:
    def sums(m: Net, x: Tensor) -> Tensor:
        for place in range(600):
            x = x + m.get_submodule("reads")(x)[..., place:].cumsum(0)
        return m.get_submodule("b")(x)  # type: ignore[no-any-return]

    model = biofx.capture(Net(sums, reads=nn.Identity(), b=nn.Linear(3, 2)))
    request.getfixturevalue("little_recursion")
    groups = biofx.unit_groups(model)
    (reading,) = groups.readings
    assert groups.representatives(reading.units).tolist() == reading.units.tolist()
    assert len(groups.sources) > 600


def test_units_of_a_residual_chain_are_one() -> None:
    groups = biofx.unit_groups(biofx.capture(nn.Sequential(nn.Linear(3, 2), Deep(50), nn.Linear(2, 1))))
    first = groups.representatives(groups.made_by("0.weight")).tolist()
    for path in groups.producers()[:-1]:
        assert groups.representatives(groups.made_by(path)).tolist() == first
    (inputs, units) = groups
    assert (inputs.producers, inputs.units) == (("input_1",), 3)
    assert units.units == 2
    assert len(units.producers) == len(units.readers) == 51


def test_a_model_that_is_no_graph_is_refused() -> None:
    with pytest.raises(biofx.errors.InputError, match="capture the model first"):
        biofx.unit_groups(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_rule_added_between_two_queries_counts() -> None:
    from biofx.analysis.forward import TABLE
    from biofx.graph.analysis_cache import analyses_kept

    model = Net(lambda m, x: m.b(m.scaled(m.a(x))), a=nn.Linear(3, 2), scaled=Scaled(), b=nn.Linear(2, 1))
    captured = biofx.capture(model, opaque=["scaled"])
    with analyses_kept():
        assert biofx.unit_groups(captured).ends
        biofx.add_unit_rule(Scaled, lambda call: call.keeps())
        try:
            assert not biofx.unit_groups(captured).ends
        finally:
            del TABLE[Scaled]


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2
