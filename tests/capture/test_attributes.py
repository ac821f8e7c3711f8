"""What a forward reads from attributes acts as in the model, or the next call after a change is an error."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import pickle
import types
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.errors import CaptureError

OFF = {"fuzzy_lr_distribution": "baseline"}
Example = tuple[tuple[Any, ...], dict[str, Any]] | None


@dataclasses.dataclass
class Settings:
    """What a model is configured with."""

    scale: float = 2.0
    activation: str = "relu"
    depth: int = 2


class Slotted:
    """Holds what it holds in slots."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 3


class Dynamic:
    """Makes attributes of what it holds in a dictionary."""

    def __init__(self) -> None:
        self.held = {"size": 3}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["held"][name]
        except KeyError:
            raise AttributeError(name) from None


class Numbers(nn.Module):
    """Reads numbers, and does arithmetic with them alone."""

    gain = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.25)
        self.temperature = 0.5
        self.rate = 0.5
        self.slope = 0.1
        self.width = 9.0
        self.times = 2
        self.low = -1.0
        self.settings = Settings()
        self.slotted = Slotted()
        self._base = 0.7

    @property
    def shift(self) -> float:
        return self._base * 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x) / self.temperature * self.gain
        x = F.dropout(F.dropout(x, self.rate, self.training), p=self.drop.p, training=self.training)
        x = F.leaky_relu(x, self.slope) / math.sqrt(self.width) + sqrt(self.width)
        x = (self.times * x).clamp(min=self.low) * self.settings.scale + self.slotted.size + self.shift
        return (1.0 - self.rate) * x


class Decisions(nn.Module):
    """Reads what decides something in Python."""

    is_shifted = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.activation = "relu"
        self.negates = False
        self.first = 0
        self.rounds = 2
        self.extra: Any = None
        self.function = torch.relu
        self.factors = [1.0, 2.0]
        self.table = {"a": {"b": 3}}
        self.pair = (1.0, 2.0)
        self.threshold = 0.1
        self.share = 0.2
        self.dtype = torch.float32
        self.array = numpy.array([1.0, 2.0])
        self.namespace = types.SimpleNamespace(scale=2.0)
        self.arguments = argparse.Namespace(mode="a")
        self.settings = Settings()
        self.several = [Settings(), Settings()]
        self.dynamic = Dynamic()
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[self.first](x) * len(self.factors) + self.layers[int(self.share)](x)
        x = getattr(F, self.activation)(x) if self.settings.activation == "relu" else x
        x = -x if self.negates else x
        for _ in range(self.rounds):
            x = x * self.factors[1] + self.table["a"]["b"] + self.pair[0]
        if self.extra is not None:
            x = x + self.extra
        x = self.function(x).to(self.dtype) * self.namespace.scale * float(self.array[0])
        if self.threshold > 0 and self.arguments.mode == "a" and self.is_shifted:
            x = x + self.several[0].scale + self.dynamic.size
        bias: Any = self.bias
        x = x if bias is None else x + bias
        return x * (getattr(self, "late", 1.0) + float(hasattr(self, "later")))


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        owner = model
        *names, last = path.split(".")
        for name in names:
            owner = getattr(owner, name)
        setattr(owner, last, value)

    return change


NUMBERS = [
    *(("temperature", 1.75), ("gain", 3.0), ("rate", 0.75), ("drop.p", 0.5), ("slope", 0.3), ("width", 4.0)),
    *(("times", 5), ("times", 0.5), ("low", 0.25), ("settings.scale", -3.0), ("_base", 4.0)),
    ("slotted.size", 7),
    *(("settings", Settings(5.0)), ("temperature", 2)),
]
DECISIONS: list[Callable[[Any], None]] = [
    *(_set("activation", "tanh"), _set("negates", True), _set("first", 1), _set("rounds", 1)),
    *(
        _set("extra", 2.0),
        _set("function", torch.tanh),
        _set("factors", [1.0, 3.0]),
        _set("pair", (3.0, 2.0)),
    ),
    *(_set("threshold", 0.2), _set("share", 1.2), _set("dtype", torch.float64), _set("namespace.scale", 3.0)),
    *(_set("arguments.mode", "b"), _set("settings.activation", "tanh"), _set("is_shifted", False)),
    *(_set("settings", None), _set("bias", nn.Parameter(torch.ones(4))), _set("late", 2.0), _set("later", 1)),
    lambda model: model.factors.append(3.0),
    lambda model: model.table["a"].update(b=4),
    lambda model: model.array.fill(5.0),
    lambda model: setattr(model.several[0], "scale", 7.0),
    lambda model: model.dynamic.held.update(size=7),
]


def _example(recorded: bool) -> Example:
    return ((torch.randn(3, 4),), {}) if recorded else None


def _made(model: nn.Module, recorded: bool) -> Any:
    return biofx.transform(model, OFF, example_inputs=_example(recorded)).graph_module


def _assert_alike(model: nn.Module, made: nn.Module, x: Tensor) -> None:
    for training in (True, False):
        model.train(training)
        made.train(training)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(made(x), expected)


@pytest.mark.parametrize("recorded", [False, True])
def test_numbers_are_read_at_every_call(recorded: bool) -> None:
    model = Numbers()
    made = _made(model, recorded)
    assert not made.graph_breaks
    x = torch.randn(3, 4)
    _assert_alike(model, made, x)
    for path, value in NUMBERS:
        for each in (model, made):
            _set(path, value)(each)
        _assert_alike(model, made, x)


def test_a_number_is_a_node_of_its_own() -> None:
    text = biofx.format_graph(_made(Numbers(), recorded=False)).splitlines()
    assert {"temperature = self.temperature", "settings_scale = self.settings.scale"} <= set(text)
    assert "sqrt = sqrt(width)" in text


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("change", DECISIONS)
def test_another_value_of_what_decided_is_an_error(change: Callable[[Any], None], recorded: bool) -> None:
    model = nn.Sequential(Decisions(), nn.Linear(4, 2)).eval()
    made = _made(model, recorded)
    assert not made.graph_breaks
    x = torch.randn(3, 4)
    assert torch.equal(made(x), model(x))
    change(made[0])
    with pytest.raises(
        CaptureError, match=r"module '0'.*(expected .*found .*\.py:\d+ reads it|its bias was None)"
    ):
        made(x)


def test_the_error_names_the_old_and_the_new_value_and_the_line() -> None:
    made = _made(nn.Sequential(Decisions()), recorded=False)
    made[0].activation = "tanh"
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "self.activation)(x)" in text)
    with pytest.raises(CaptureError) as caught:
        made(torch.randn(3, 4))
    message = str(caught.value)
    assert "attribute 'activation' of module '0' (Decisions): expected 'relu'" in message
    assert f"found 'tanh'; {__file__}:{line} reads it" in message
    made[0].activation = "relu"
    assert made(torch.randn(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("recorded", [False, True])
def test_copies_and_pickles_read_and_check_their_own(recorded: bool) -> None:
    model = nn.Sequential(Numbers(), Decisions()).eval()
    made = _made(model, recorded)
    x = torch.randn(3, 4)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert torch.equal(copied(x), model(x))
    copied = copy.deepcopy(made)
    copied[0].temperature = 3.0
    assert torch.equal(made(x), model(x))
    assert not torch.equal(copied(x), model(x))
    copied[1].table["a"]["b"] = 4
    assert torch.equal(made(x), model(x))
    with pytest.raises(CaptureError, match="'table'"):
        copied(x)


def test_passes_keep_what_is_read_and_checked() -> None:
    config = {"apply_dales_principle": True, "weight_splitting_Gamma": 2}
    made: Any = biofx.transform(nn.Sequential(Numbers(), nn.Linear(4, 4), Decisions()), config).graph_module
    x = torch.randn(3, 4)
    before = made.eval()(x)
    made[0].settings.scale = 5.0
    assert not torch.equal(made(x), before)
    made[2].negates = True
    with pytest.raises(CaptureError, match="'negates'"):
        made(x)


class DecidesByValue(nn.Module):
    """Keeps its eager forward; what it calls has a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Numbers(), Decisions()])
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        for inner in self.inner:
            x = inner(x)
        return x * self.scale


@pytest.mark.parametrize("recorded", [False, True])
def test_graphs_below_a_forward_in_python_read_and_check_too(recorded: bool) -> None:
    model: Any = DecidesByValue().eval()
    made = _made(model, recorded)
    assert list(made.graph_breaks) == [""]
    assert {"inner.0", "inner.1"} <= set(made.region_paths)
    x = torch.randn(3, 4)
    for each in (model, made):
        each.scale, each.inner[0].temperature, each.inner[0].settings.scale = 3.0, 4.0, 5.0
    assert torch.equal(made(x), model(x))
    made.inner[1].rounds = 1
    with pytest.raises(CaptureError, match=r"'rounds' of module 'inner\.1' \(Decisions\)"):
        made(x)


def test_a_child_reads_from_its_parent() -> None:
    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.around = [parent]

        def forward(self, x: Tensor) -> Any:
            return self.layer(x) * self.around[0].gain

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = 2.0
            self.child = Child(self)

        def forward(self, x: Tensor) -> Any:
            return self.child(x)

    model, x = Parent(), torch.randn(3, 4)
    made = _made(model, recorded=False)
    model.gain = made.gain = 5.0
    assert torch.equal(made(x), model(x))


def test_a_number_that_is_one_no_longer_is_an_error_of_ours() -> None:
    made = _made(Numbers(), recorded=False)
    made.temperature = None
    with pytest.raises(CaptureError, match=r"expected a number, .* found None"):
        made(torch.randn(3, 4))


def test_deploy_keeps_the_values_of_now() -> None:
    model: Any = nn.Sequential(Numbers(), Decisions()).eval()
    made = _made(model, recorded=False)
    for each in (model, made):
        each[0].temperature, each[0].width = 3.0, 16.0
    deployed = biofx.deploy(made)
    x = torch.randn(3, 4)
    assert torch.equal(deployed(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), model(x))


def test_a_compiled_model_reads_and_checks_too() -> None:
    model: Any = nn.Sequential(Numbers(), nn.Linear(4, 2)).eval()
    made = _made(model, recorded=False)
    torch.compiler.reset()
    compiled: Any = torch.compile(made, backend="eager")
    x = torch.randn(3, 4)
    assert torch.equal(compiled(x), model(x))
    for each in (model, made):
        each[0].temperature, each[0].settings.scale = 3.0, 5.0
    assert torch.equal(compiled(x), model(x))


def test_a_compiled_model_refuses_a_change() -> None:
    made = _made(nn.Sequential(Decisions()).eval(), recorded=False)
    torch.compiler.reset()
    compiled: Any = torch.compile(made, backend="eager")
    x = torch.randn(3, 4)
    compiled(x)
    made[0].negates = True
    with pytest.raises(CaptureError, match="'negates'"):
        compiled(x)


def test_analyses_take_a_number_for_a_constant() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.first(x)) * 1.5
            return self.last(F.relu(self.second(x) / sqrt(1.5)))

    class Reading(Plain):
        gain = 1.5

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.first(x)) * self.gain
            return self.last(F.relu(self.second(x) / math.sqrt(self.gain)))

    for config in ({"apply_dales_principle": True}, {"weight_splitting_Gamma": 2}):
        reports = [biofx.transform(kind(), config).report for kind in (Plain, Reading)]
        plain, reading = ([(r.kind, r.layer, r.message) for r in report.remarks] for report in reports)
        assert plain == reading


def test_classes_are_as_they_were_after_a_capture() -> None:
    before = [dict(vars(kind)) for kind in (Numbers, Decisions, nn.Linear, Settings)]
    _made(nn.Sequential(Numbers(), Decisions()), recorded=False)
    _made(nn.Sequential(Numbers(), Decisions()), recorded=True)
    assert [dict(vars(kind)) for kind in (Numbers, Decisions, nn.Linear, Settings)] == before
    assert math.sqrt is sqrt
