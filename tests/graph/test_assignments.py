from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, CaptureError, capture
from biofx.errors import PassError
from biofx.graph.graph_functions import assign_buffer
from biofx.plasticity.bio_module import BioModule


class Body(nn.Module):
    mean: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)


class Follows(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        self.steps += 1
        return self.last(y - self.mean)


class KeepsTheOldOne(Body):
    """What was read before is the old tensor, whenever it is used."""

    def forward(self, x: Tensor) -> Any:
        before = self.mean
        self.mean = x.mean(0)
        return self.last(self.first(x) + before) + self.mean.sum()


class Twice(Body):
    def forward(self, x: Tensor) -> Any:
        for _ in range(2):
            self.mean = self.mean * 0.5 + x.mean(0)
        return self.last(self.first(x) * self.mean)


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(8, 8), Follows()])

    def forward(self, x: Tensor) -> Any:
        return self.parts[1](torch.relu(self.parts[0](x)))


class WithoutGradient(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        with torch.no_grad():
            self.mean = self.mean.lerp(y.mean(0), 0.1)
        return self.last(y * self.mean)


MODELS: list[type[nn.Module]] = [Follows, KeepsTheOldOne, Twice, Inside, WithoutGradient]


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))


def outcome(model: nn.Module) -> Any:
    """Three calls, which leave something behind; on a copy."""
    model = copy.deepcopy(model)
    outputs = [model(inputs(batch)) for batch in (4, 3, 5)]
    torch.stack([output.pow(2).sum() for output in outputs]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return outputs, gradients, dict(model.named_buffers())


def recorded_of(model: nn.Module, **options: Any) -> Any:
    return capture(model, example_inputs=((inputs(),), {}), **options)


@pytest.mark.parametrize("model_class", MODELS)
def test_an_assignment_to_a_buffer_is_a_node(
    model_class: type[nn.Module], unchanged: Callable[[nn.Module], Any]
) -> None:
    model = model_class()
    with unchanged(model):
        captured = recorded_of(model, regions=False)
    assert captured.graph.find_nodes(op="call_function", target=assign_buffer)
    for training in (True, False):
        expected = outcome(model.train(training))
        for other in (captured, pickle.loads(pickle.dumps(captured))):
            torch.testing.assert_close(outcome(other.train(training)), expected, rtol=0, atol=0)
    assert captured.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("model_class", MODELS)
def test_rewritten_models_assign_too(model_class: type[nn.Module]) -> None:
    model = model_class()
    config = BioConfig(fuzzy_learning_rate_factor_nu=0.2)
    bio_model, _ = biofx.transform(model, config, example_inputs=((inputs(),), {}))
    expected, found = outcome(model), outcome(bio_model)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    for name, buffer in expected[2].items():
        torch.testing.assert_close(found[2][name], buffer, rtol=0, atol=0)
    with pytest.raises(PassError, match="assigns to a buffer"):
        biofx.deploy(bio_model)
    with pytest.raises(CaptureError, match="cannot be traced again"):
        torch.fx.symbolic_trace(bio_model)


def test_a_compiled_graph_assigns() -> None:
    model = Follows()
    captured = recorded_of(model)
    compiled: Any = torch.compile(captured, backend="aot_eager", fullgraph=True)
    for batch in (4, 4):
        torch.testing.assert_close(compiled(inputs(batch)), model(inputs(batch)))
    torch.testing.assert_close(captured.mean, model.mean)
    torch._dynamo.reset()


class Grows(Body):
    """Holds on to a batch."""

    def forward(self, x: Tensor) -> Any:
        y = self.last(self.first(x) + self.mean)
        self.mean = torch.cat([self.mean, x.detach().mean(0)])[-8:].clone()
        return y


class HoldsABatch(Body):
    def forward(self, x: Tensor) -> Any:
        self.mean = x.detach()
        return self.last(self.first(x) + self.mean.sum(0))


class HoldsAnActivation(Body):
    last_seen: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.last_seen is not None:
            y = y + self.last_seen
        self.last_seen = y.detach().mean(0)
        return self.last(y)


class AssignsInTraining(Body):
    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return self.last(y - self.mean)


@pytest.mark.parametrize(
    ("model_class", "in_python"),
    [(Grows, False), (HoldsABatch, True), (HoldsAnActivation, True), (AssignsInTraining, False)],
)
def test_what_would_change_more_than_values_stays_in_python(
    model_class: type[nn.Module], in_python: bool
) -> None:
    model = model_class()
    captured = recorded_of(model)
    assert list(captured.graph_breaks) == ([""] if in_python else [])
    for training in (True, False):
        found, expected = (outcome(each.train(training)) for each in (captured, model))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_another_shape_than_before_is_an_error_and_nothing_is_assigned() -> None:
    captured = recorded_of(Follows())
    captured.mean = torch.zeros(1)
    with pytest.raises(
        biofx.errors.InputError, match=r"expected \(1,\) of torch\.float32 as before, found \(8,\)"
    ):
        captured(inputs())
    assert captured.mean.shape == (1,)


class Decides(Body):
    """Its parts are regions."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.other = WithoutGradient(), Follows()
        nn.init.constant_(self.first.bias, 100)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        z = self.part(y)
        return z + self.other(y) if y.sum() > 0 else z


def test_regions_assign_and_open_contexts_too() -> None:
    model = Decides()
    bio_model, report = biofx.transform(
        model, BioConfig(fuzzy_learning_rate_factor_nu=0.3), example_inputs=((inputs(),), {})
    )
    assert list(bio_model.graph_breaks) == [""]
    assert report.coverage is not None
    assert report.coverage.visible == report.coverage.total
    rates = {
        f"{path.removesuffix('.bio_mod')}.weight": state.fuzzy_learning_rate_parameters
        for path, state in bio_model.named_modules()
        if isinstance(state, BioModule)
    }
    assert len(rates) == 6
    for other in (bio_model, copy.deepcopy(bio_model), pickle.loads(pickle.dumps(bio_model))):
        for bias in (100.0, -100.0):
            for each in (model, other):
                nn.init.constant_(each.get_parameter("first.bias"), bias)
            expected, found = outcome(model), outcome(other)
            torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
            for name, factors in rates.items():
                gradient = expected[1][name]
                torch.testing.assert_close(
                    found[1][name], gradient if gradient is None else gradient * factors
                )
            for name, buffer in expected[2].items():
                torch.testing.assert_close(found[2][name], buffer, rtol=0, atol=0)
