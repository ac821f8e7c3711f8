from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig
from biofx.graph.graph_view import GraphView
from biofx.graph.regions import region_paths
from biofx.layers.sites import find_sites
from biofx.rewriting.model_coverage import coverage_of
from biofx.rewriting.remarks import PassReport, Remark


class Mixed(nn.Module):
    """Parameters of every fate: rewritten, visible, read in Python, never used."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.unused = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(2, 2)
        self.asks = Asks()

    def forward(self, x: Tensor) -> Any:
        return self.asks(self.norm(self.fc(x)))


def may_read_parameters(module: nn.Module, given: Any) -> None:
    """A hook that might compute a weight ahead of the forward, as weight_norm's does."""


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 3)
        self.register_forward_pre_hook(may_read_parameters)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x * self.gain if x.sum() > 0 else x)


def test_every_parameter_is_rewritten_or_listed_with_a_reason() -> None:
    model = Mixed()
    _, report = biofx.transform(model, passes="scale-gradients")
    coverage = report.coverage
    assert coverage is not None
    left = {entry.path: entry for entry in coverage.left}
    assert list(left) == [
        *("fc.bias", "norm.weight", "norm.bias", "unused.weight", "unused.bias"),
        *("asks.gain", "asks.inner.bias"),
    ]
    assert coverage.total == sum(parameter.numel() for parameter in model.parameters()) == 53
    assert coverage.rewritten == 16 + 12
    assert coverage.visible == 53 - 6 - 4
    assert coverage.rewritten + sum(entry.elements for entry in coverage.left) == coverage.total
    assert "weight of LayerNorm" in left["norm.weight"].reason
    assert left["unused.weight"].reason == "never used in the forward"
    assert not left["unused.weight"].is_visible
    assert left["asks.gain"].reason.startswith("used by Python: module 'asks' (Asks)")
    assert "forward pre hooks" in left["asks.gain"].reason
    assert str(coverage) == "53 parameters: 28 rewritten (52.8%), 43 visible (81.1%)"


def test_a_selection_leaves_its_reason() -> None:
    _, report = biofx.transform(Mixed(), passes="scale-gradients", exclude="fc")
    assert report.coverage is not None
    (entry,) = (entry for entry in report.coverage.left if entry.path == "fc.weight")
    assert entry.reason == "excluded by 'fc'"
    assert entry.is_visible


def test_coverage_is_part_of_the_json_form() -> None:
    _, report = biofx.transform(Mixed(), passes="scale-gradients")
    found = json.loads(report.to_json())["coverage"]
    assert set(found) == {"total", "rewritten", "visible", "left", "kept", "mechanisms"}
    assert set(found["left"][0]) == {"path", "elements", "reason", "is_visible"}
    assert list(found["kept"]) == ["asks"]


def test_a_tied_parameter_counts_once(mlp: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    _, report = biofx.transform(model, passes="scale-gradients")
    assert report.coverage is not None
    assert (report.coverage.total, report.coverage.rewritten) == (24, 16)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return x * self.gain


class Decides(nn.Module):
    """Asks for a value, and calls modules that hold parameters, but no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.norm, self.act = Gain(), nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        return self.act(self.norm(x)) if x.sum() > 0 else self.gain(x)


def test_what_python_calls_is_visible_with_or_without_a_matrix() -> None:
    model = Decides()
    both: list[dict[str, Any]] = [{}, {"example_inputs": ((-torch.ones(3, 4),), {})}]
    for options in both:
        captured = biofx.capture(model, **options)
        assert set(region_paths(captured)) == {"gain", "norm"}
        coverage = coverage_of(captured, find_sites(captured), {}, ())
        assert (coverage.total, coverage.visible) == (12, 12)
        for x in (torch.randn(3, 4).abs(), -torch.randn(3, 4).abs()):
            torch.testing.assert_close(captured(x), copy.deepcopy(model)(x), rtol=0, atol=0)


# one pass


def test_coverage_counts_layers_parameters_and_reasons(mlp: nn.Module) -> None:
    report = biofx.transform(mlp, BioConfig(weight_splitting_Gamma=2), only=["0", "2"]).report
    assert report.before is not None
    split = report.passes[0].coverage(report.before)
    assert (split.layers, split.candidate_layers) == (2, 3)
    assert split.parameters == (4 * 6 + 6) + 6 * 4  # the second layer has no bias
    assert split.all_parameters == sum(p.numel() for p in mlp.parameters()) == 54 + 4 * 2 + 2
    assert split.fraction == 54 / 64
    (reason,) = split.reasons
    assert reason == "not selected by only=['0', '2']"


def test_reasons_come_with_the_most_frequent_first_and_a_layer_counts_once() -> None:
    remarks = [Remark("missed", n, "fc", why) for n, why in (("a", "x"), ("b", "y"), ("c", "y"))]
    remarks += [Remark("applied", "d", "fc", "done"), Remark("applied", "e", "fc", "done")]
    found = PassReport("p", "p", tuple(remarks), ()).coverage(GraphView((), {}))
    assert list(found.reasons.items()) == [("y", 2), ("x", 1)]
    assert (found.layers, found.candidate_layers, found.fraction) == (1, 1, 0.0)
