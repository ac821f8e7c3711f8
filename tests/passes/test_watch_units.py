"""Which units can be replaced, and why others cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.operators.observed_inputs import observe_inputs
from biofx.passes import WatchUnits


def watch(model: nn.Module, before: str = "", **options: Any) -> tuple[Any, dict[str, str]]:
    passes: list[Any] = [*([before] if before else []), WatchUnits(**options)]
    result = biofx.transform(model, passes=passes)
    remarks = result.report.passes[-1].remarks
    return result.graph_module, {remark.layer: f"{remark.kind}: {remark.message}" for remark in remarks}


def test_graph_and_report(golden: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.Linear(5, 2),
    )
    result = biofx.transform(model, passes="watch-units")
    golden("watch_units", f"{biofx.format_graph(result.graph_module)}\n\n{result.report}")
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=0, atol=0)


class Cases(nn.Module):
    """Units of ``fc`` that something else than a known weight uses, too."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.prelu, self.instance = nn.PReLU(4), nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.gru = nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        case = self.case
        if case == "output":
            return self.out(h.relu()), h
        if case == "product":
            h = h * self.other(x)
        if case == "part":
            h = torch.cat([h[:, :2], h[:, 2:]], 1)
        if case == "softmax":
            h = h.softmax(-1)
        if case == "input":
            h = h + x
        if case == "prelu":
            h = self.prelu(h)
        if case == "twice":
            h = self.fc(h.relu())
        if case == "norm twice":
            h = self.instance(self.instance(h))
        if case == "function norm":
            h = F.layer_norm(h, (4,))
        if case == "weight read":
            return self.out(h.relu()) + self.fc.weight.sum()
        if case == "read weight read":
            return self.out(h.relu()) + self.out.weight.sum()
        if case == "scaled":
            h = h * self.scale
        if case == "state":
            return self.out(self.gru(x, h.relu())[0])
        if case == "matmul":
            return self.out(h.relu()) @ h.T
        return self.out(h.relu())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("output", "its units are an output of the model"),
        ("part", "its units go into 'getitem', behind which they are not known"),
        ("softmax", "its units go into 'softmax', behind which they are not known"),
        ("input", "units of 'x', which no layer makes, are one with its units"),
        ("prelu", "its units go through 'prelu', a PReLU with parameters"),
        ("twice", "units of 'x', which no layer makes, are one with its units"),
        ("norm twice", "its units go through 'instance', a normalisation that is no module's alone"),
        ("function norm", "its units go through 'layer_norm', a normalisation that is no module's alone"),
        (
            "weight read",
            "'fc.weight' makes its units: its weight is also read by 'sum_1', which would not follow",
        ),
        (
            "read weight read",
            "'out.weight' reads its units: its weight is also read by 'sum_1', which would not follow",
        ),
        ("scaled", "its units go through 'mul', which 'scale' scales"),
        ("state", "its units go into 'gru', behind which they are not known"),
        ("matmul", "its units go through 'getattr_1', which combines or parts them"),
    ],
)
def test_units_that_something_unknown_uses_stay(case: str, reason: str) -> None:
    bio, said = watch(Cases(case))
    assert said["fc"] == f"missed: {reason}"
    assert not bio.graph.find_nodes(op="call_function", target=observe_inputs) or case != "output"


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("split-weights{gamma=2}", "makes only some of its units, or one several times"),
        ("split-weights{gamma=2,mode=sub-weights}", "sum of sub-weights"),
        ("scale-gradients{parameters=all}", "its bias is not the layer's alone"),
    ],
)
def test_rewritten_weights_that_are_not_a_layers_alone_stay(before: str, reason: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    _, said = watch(model, before)
    assert said["0"].startswith("missed: ")
    assert reason in said["0"]


def test_tied_weights_and_shared_biases_stay() -> None:
    model = Cases("")
    model.out.weight = model.fc.weight
    assert watch(model)[1]["fc"] == "missed: units of 'x', which no layer makes, are one with its units"
    deep = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    deep[4].weight = deep[2].weight
    assert watch(deep)[1]["0"] == "missed: '2.weight' makes its units: it is used more than once"
    model = Cases("")
    model.out.bias = model.fc.bias
    assert watch(model)[1]["fc"] == "missed: 'fc.weight' makes its units: its bias is not the layer's alone"


def test_a_layer_that_is_not_selected_takes_no_part() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    _, said = watch(model, exclude="4")
    assert said["0"] == "applied: 4 units can be replaced, read by '2'"
    assert said["2"].startswith("missed: '4' takes part: ")


def test_the_second_time_nothing_happens() -> None:
    bio, _ = watch(Cases(""))
    again, said = watch(bio)
    assert said["fc"] == "missed: its units are watched already"
    assert biofx.format_graph(again) == biofx.format_graph(bio)


def test_units_that_python_passes_on_stay_and_those_inside_a_region_do_not() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())  # type: ignore[no-any-return]

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Block(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            while x.abs().max() < 1:
                x = x + self.inner(x).abs() + 0.1
            return self.out(x)  # type: ignore[no-any-return]

    bio, said = watch(Loop())
    assert said["inner.up"] == "applied: 6 units can be replaced, read by 'inner.down'"
    assert "behind which they are not known" in said["inner.down"]
    bio(torch.full((3, 4), 0.01))
    seen = bio.get_submodule("inner.down").bio_mod.input_activity
    assert float(seen[0, 0]) > 1  # as often as the loop ran


def test_factors_of_a_product_make_one_unit_each() -> None:
    """As the gate and what it lets through do in the hidden layer of many transformers."""
    _, said = watch(Cases("product"))
    assert said["fc"] == "applied: 4 units can be replaced, read by 'out'"
    assert said["other"] == ("applied: 4 units can be replaced, read by 'out', together with those of 'fc'")


def test_a_deployed_model_watches_nothing() -> None:
    bio, _ = watch(Cases(""))
    x = torch.randn(3, 4)
    plain = biofx.deploy(bio)
    assert not [node for node in plain.graph.nodes if node.target is observe_inputs]  # type: ignore[union-attr]
    torch.testing.assert_close(plain(x), copy.deepcopy(bio).eval()(x))


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), -1), ((3,), -1), ((2, 3, 4), -2)])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_what_the_operator_sees(shape: tuple[int, ...], axis: int, nonnegative: bool) -> None:
    x = torch.randn(2, *shape)
    x = x.abs() if nonnegative else x
    seen = torch.zeros(4, 3)
    for batch in x:
        assert observe_inputs(batch, seen, True, channel_axis=axis, nonnegative=nonnegative) is batch
    observe_inputs(x[0] / 0, seen, True, channel_axis=axis, nonnegative=nonnegative)
    observe_inputs(x[0], seen, False, channel_axis=axis, nonnegative=nonnegative)
    channels = x.movedim(axis, 1).flatten(2) if len(shape) > 1 else x[..., None]
    channels = x.movedim(axis, 0).flatten(1)
    torch.testing.assert_close(seen[1] / 2, channels.abs().mean(1))
    torch.testing.assert_close(seen[2] / 2, channels.mean(1))
    assert seen[0].tolist() == [2.0] * 3
