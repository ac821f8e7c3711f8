"""Parameters that no layer holds, or that more than a layer reads."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.layers.sites import find_sites
from biofx.plasticity.model_states import bio_modules

WEIGHTS = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3)
ALL = WEIGHTS.replace(fuzzy_lr_parameters="all")


class Direct(nn.Module):
    """Positions, a class token, a layer scale, a scalar, a weight in einsum, one that a layer has too."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.token = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.gamma, self.temperature = nn.Parameter(torch.ones(8)), nn.Parameter(torch.tensor(2.0))
        self.mix, self.unused = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.norm, self.dense = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x + self.positions], 1)
        x = self.norm(self.gamma * torch.relu(self.dense(x)) * self.temperature) + self.frozen
        return torch.einsum("bsi,oi->bso", x, self.mix) + x @ self.dense.weight.T


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(x) ** 2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def scaled_in(bio_model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Any] = {
        path: state for path, state in bio_modules(bio_model).items() if state.has_factors
    }
    return {path: state.fuzzy_learning_rate_parameters for path, state in found.items()}


@pytest.fixture(params=["traced", "recorded"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"example_inputs": ((torch.randn(2, 5, 8),), {})} if request.param == "recorded" else {}


@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        (WEIGHTS.replace(fuzzy_learning_rate_factor_nu=0.0), set()),
        (WEIGHTS, {"mix", "dense.weight"}),
        (
            ALL,
            {
                *("positions", "token", "gamma", "temperature", "mix"),
                *("norm.weight", "norm.bias", "dense.weight", "dense.bias"),
            },
        ),
    ],
)
def test_gradients_are_scaled_to_the_bit(
    config: biofx.BioConfig, scaled: set[str], options: dict[str, Any]
) -> None:
    model, x = Direct(), torch.randn(3, 5, 8)
    bio_model, report = biofx.transform(model, config, **options)
    assert torch.equal(bio_model(x), model(x))
    rates = scaled_in(bio_model)
    assert set(rates) == scaled
    plain, found = gradients(model, x), gradients(bio_model, x)
    assert set(plain) == set(found)
    for name, gradient in plain.items():
        expected = gradient * rates[name] if name in rates else gradient
        assert torch.equal(found[name], expected), name
    assert report.coverage is not None
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert report.coverage.rewritten == sum(sizes[name] for name in scaled)
    assert report.coverage.visible == sum(sizes.values()) - 2
    assert {entry.path for entry in report.coverage.left} == sizes.keys() - scaled
    assert str(biofx.check(bio_model)).startswith("Direct: every invariant holds")


def test_a_second_transform_scales_nothing_twice() -> None:
    bio_model, _ = biofx.transform(Direct(), ALL)
    again, report = biofx.passes.ScaleGradients(parameters="all")(bio_model)
    assert not report.modified
    assert {remark.message.removeprefix("bias: ") for remark in report.passes[0].remarks} >= {
        "its gradient is scaled already"
    }
    assert torch.equal(again(torch.ones(1, 5, 8)), bio_model(torch.ones(1, 5, 8)))


def test_an_override_picks_them_by_node_and_by_layer() -> None:
    config = WEIGHTS.override("positions", fuzzy_lr_parameters="all").override(
        "norm", fuzzy_lr_parameters="all"
    )
    bio_model, _ = biofx.transform(Direct(), config)
    assert set(scaled_in(bio_model)) == {"positions", "norm.weight", "norm.bias", "mix", "dense.weight"}


def test_what_is_not_scaled_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign = nn.Parameter(torch.ones(4))
            self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x) * self.sign * self.phase

    _, report = biofx.transform(Odd(), ALL)
    told = {remark.node: remark.message for remark in report.passes[0].remarks if remark.kind == "missed"}
    assert told["sign"] == "sign: plasticity states use its name, 'sign', for something else"
    assert "phase" not in told


@pytest.mark.parametrize("granularity", ["neuron", "layer"])
def test_coarser_factors(granularity: str) -> None:
    bio_model, _ = biofx.transform(Direct(), ALL.replace(fuzzy_lr_granularity=granularity))
    shapes = {path: tuple(rates.shape) for path, rates in scaled_in(bio_model).items()}
    assert shapes["temperature"] == ()
    assert shapes["mix"] == ((8, 1) if granularity == "neuron" else (1, 1))
    assert shapes["gamma"] == ((8,) if granularity == "neuron" else (1,))
    assert torch.isfinite(bio_model(torch.ones(1, 5, 8))).all()


def test_deployed_and_saved() -> None:
    model, x = Direct(), torch.randn(3, 5, 8)
    bio_model, _ = biofx.transform(model, ALL)
    deployed = biofx.deploy(bio_model)
    assert torch.equal(deployed(x), model(x))
    assert not any(name for name in deployed.state_dict() if "bio_mod" in name)
    file = io.BytesIO()
    torch.save(bio_model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(gradients(loaded, x), gradients(bio_model, x), rtol=0, atol=0)
    other, _ = biofx.transform(Direct(), ALL.replace(seed=7))
    other.load_state_dict(bio_model.state_dict())
    torch.testing.assert_close(gradients(other, x), gradients(bio_model, x), rtol=0, atol=0)
    bio_model.load_state_dict(model.state_dict(), strict=False)


def test_rules_know_what_is_no_synapse() -> None:
    bio_model, _ = biofx.transform(Direct(), ALL)
    states = bio_modules(bio_model)
    assert states["positions"].why_never("rejuvenate_weights") is not None
    assert states["dense.weight"].why_never("rejuvenate_weights") is None
    optimizer = torch.optim.Adam(bio_model.parameters(), 1e-2)
    biofx.attach(bio_model, optimizer)
    before = {name: parameter.detach().clone() for name, parameter in bio_model.named_parameters()}
    gradients(bio_model, torch.randn(3, 5, 8))
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs() for name, p in bio_model.named_parameters()}
    for name, rates in scaled_in(bio_model).items():  # the first step of Adam is lr in size, scaled here
        torch.testing.assert_close(moved[name], 1e-2 * rates, rtol=1e-3, atol=1e-5)


def test_what_is_read_as_a_layer_and_what_is_not() -> None:
    sites = find_sites(biofx.capture(Direct()))
    assert [site.parameter_path for site in sites.found] == ["dense.weight", "mix", "dense.weight"]
    assert {site.parameter_path for site in sites.reads} == {
        *("positions", "token", "gamma", "temperature", "frozen")
    }
