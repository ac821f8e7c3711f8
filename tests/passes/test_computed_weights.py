"""Learning rates of weights that a parametrization computes: the gradient is scaled where it reaches them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import biofx
from biofx.capture.capture import capture
from biofx.operators.rate_sampling import Distribution
from biofx.passes import ScaleGradients


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4, bias=False)),
    "symmetric": symmetric,
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        parametrizations.weight_norm(nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular")),
        parametrizations.spectral_norm(nn.ConvTranspose1d(2, 1, 3, padding=1)),
        nn.Flatten(),
    ),
}


class CallsTwice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


class Decides(CallsTwice):
    """Python calls the layer, which is a region by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


def scale_by_hand(model: nn.Module, rates: dict[str, Tensor]) -> None:
    """Let the gradient that reaches each computed weight be multiplied: the definition."""

    class Scaled(nn.Module):
        def __init__(self, rates: Tensor) -> None:
            super().__init__()
            self.rates = rates

        def forward(self, weight: Tensor) -> Tensor:
            weight = weight.view_as(weight)
            if weight.requires_grad:
                weight.register_hook(lambda gradient: gradient * self.rates)
            return weight

    for path, factors in rates.items():
        parametrize.register_parametrization(
            model.get_submodule(path), "weight", Scaled(factors), unsafe=True
        )


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(x)
    output.sin().sum().backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("around", [CallsTwice, Decides])
def test_the_gradient_of_the_computed_weight_is_scaled(
    name: str, around: type[CallsTwice], recorded: bool, dtype: str
) -> None:
    model = around(LAYERS[name]())
    x = torch.randn(3, 4)
    captured = capture(model, example_inputs=((x,), {}) if recorded else None)
    scaled = ScaleGradients(distribution=Distribution.LOGNORMAL, dtype=dtype)(captured)
    report = scaled.report
    bio_model: Any = scaled.graph_module
    assert report.coverage is not None
    assert not [entry for entry in report.coverage.left if "parametrizations" in entry.path]
    layers = [path for path, module in model.named_modules() if parametrize.is_parametrized(module)]
    rates = {
        path: bio_model.get_buffer(f"{path}.bio_mod.fuzzy_learning_rate_parameters").float()
        for path in layers
    }
    assert all(factors.std() > 0 for factors in rates.values())
    reference = copy.deepcopy(model)
    scale_by_hand(reference, rates)
    for training in (True, False, True):
        expected, gradients = run(reference.train(training), x)
        found, own = run(bio_model.train(training), x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(own, gradients)


@pytest.mark.parametrize("name", LAYERS)
def test_the_model_is_copied_audited_saved_and_deployed(name: str, tmp_path: Any) -> None:
    model = nn.Sequential(LAYERS[name](), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    bio_model, _ = biofx.transform(model, {"weight_splitting_Gamma": 2, "apply_dales_principle": True})
    assert {(fault.invariant, fault.subject) for fault in biofx.check(bio_model).faults} == {
        ("asked", "signs")  # between an input layer and the readout there is none that could have signs
    }
    biofx.save(bio_model, tmp_path / "model.pt")
    loaded: Any = biofx.load(tmp_path / "model.pt", copy.deepcopy(model))
    expected = bio_model.eval()(x)
    for made in (copy.deepcopy(bio_model), loaded):
        torch.testing.assert_close(made.eval()(x), expected, rtol=0, atol=0)
    deployed = biofx.deploy(bio_model)
    torch.testing.assert_close(deployed(x), expected)
    parametrized = [module for module in deployed.modules() if parametrize.is_parametrized(module)]
    assert len(parametrized) == sum(parametrize.is_parametrized(module) for module in model.modules())


def test_factors_that_follow_a_parameter_are_refused_and_frozen_weights_left_alone() -> None:
    model = nn.Sequential(LAYERS["weight norm"](), nn.Linear(4, 2))
    _, report = biofx.transform(model, {"fuzzy_lr_distribution": "weight_adaptive", "fuzzy_lr_dynamic": True})
    said = {remark.layer: remark.message for entry in report.passes for remark in entry.remarks}
    assert said["0"] == "a parametrization computes it, and weight_adaptive factors follow a parameter"
    _, report = biofx.transform(model, {"fuzzy_lr_dtype": "seed"})
    said = {remark.layer: remark.message for entry in report.passes for remark in entry.remarks}
    assert said["0"].endswith("'seed' factors take a parameter; use 'float32'")
    model[0].requires_grad_(False)
    _, report = biofx.transform(model)
    said = {remark.layer: remark.message for entry in report.passes for remark in entry.remarks}
    assert said["0"] == "its weight is frozen (requires_grad is False)"
