"""Layers without inputs or outputs, and weights that are no arrays of real numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.layers.weight_site import sign_blocker, weight_blocker

CONFIGS: dict[str, dict[str, Any]] = {
    "rates": {"fuzzy_learning_rate_factor_nu": 0.2},
    "all rates": {"fuzzy_learning_rate_factor_nu": 0.2, "fuzzy_lr_parameters": "all"},
    "splits": {"weight_splitting_Gamma": 2},
    "signs": {"apply_dales_principle": True},
    "expanded": {"apply_dales_principle": True, "dales_method": "expand"},
    "activity": {"fuzzy_lr_distribution": "activity", "fuzzy_learning_rate_factor_nu": 0.2},
}


def layers(first: int, second: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(6, first), activation(), nn.Linear(first, second), activation(), nn.Linear(second, 2))
    )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("recorded", [False, True], ids=["traced", "recorded"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sizes", [(0, 6), (6, 0), (0, 0), (4, 0)], ids=str)
def test_a_model_with_layers_of_no_units_is_rewritten_around_them(
    sizes: tuple[int, int], config: str, recorded: bool
) -> None:
    model: Any = layers(*sizes)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    found = biofx.transform(model, CONFIGS[config], example_inputs=x if recorded else None)
    bio_model: Any = found.graph_module
    report = found.report
    assert torch.equal(bio_model(x), model(x))  # the bias alone: nothing comes through
    empty = {str(place) for place in (0, 2, 4) if not model[place].weight.numel()}
    told = {remark.layer: remark for remark in report.remarks}
    assert {told[layer].kind for layer in empty} == {"missed"}
    for layer in empty if config == "rates" else ():
        shape = tuple(model[int(layer)].weight.shape)
        assert told[layer].message == f"it has no weights: their shape is {shape}"
    bio_model(x).sum().backward()
    biofx.check(bio_model)
    deployed: Any = biofx.deploy(bio_model)
    assert torch.equal(deployed(x), model(x))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_weights_have_rates_and_no_signs() -> None:
    model = layers(4, 4, nn.Identity).to(torch.complex64)
    x = torch.randn(3, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    config = CONFIGS["signs"] | CONFIGS["rates"]
    bio_model, report = biofx.transform(model, config)
    torch.testing.assert_close(bio_model(x), model(x))
    missed = [remark for remark in report.remarks if "complex" in remark.message]
    assert {remark.layer for remark in missed} == {"2"}
    bio_model(x).abs().sum().backward()
    model(x).abs().sum().backward()
    for place in (0, 2, 4):
        layer: Any = bio_model.get_submodule(str(place))
        factors = layer.bio_mod.fuzzy_learning_rate_parameters
        torch.testing.assert_close(layer.weight.grad, model[place].weight.grad * factors)
    with pytest.raises(biofx.errors.PlasticityError, match="expected real weights"):
        bio_model.rejuvenate_weights()


@pytest.mark.parametrize("config", CONFIGS)
def test_whole_and_tiny_numbers_are_left_alone(config: str) -> None:
    model = layers(4, 4)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model[2].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    bio_model, report = biofx.transform(model, CONFIGS[config])
    kinds = {remark.layer: remark.kind for remark in report.remarks}
    assert kinds["2"] == "missed" or config == "splits"
    assert torch.equal(bio_model.get_parameter("2.weight"), model[2].weight)
    biofx.check(bio_model)


def test_why_a_weight_is_left_alone() -> None:
    assert weight_blocker(torch.ones(2, 2)) is None
    assert weight_blocker(nn.Parameter(torch.ones(2, 2).bfloat16())) is None
    assert weight_blocker(torch.ones(2, dtype=torch.complex64)) is None
    told = {
        "no weights: their shape is (0, 3)": torch.ones(0, 3),
        "sparse (torch.sparse_coo)": torch.eye(2).to_sparse(),
        "torch.int8": torch.ones(2, dtype=torch.int8),
        "torch.float8_e4m3fn": torch.ones(2).to(torch.float8_e4m3fn),
    }
    for words, weight in told.items():
        assert words in str(weight_blocker(weight))
    assert sign_blocker(torch.ones(2)) is None
    assert "complex" in str(sign_blocker(torch.ones(2, dtype=torch.complex64)))


def test_a_rule_on_a_sparse_gradient_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    bio_model, _ = biofx.transform(model, CONFIGS["rates"])
    bio_model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(biofx.errors.PlasticityError, match=r"'0\.weight' has a sparse gradient"):
        bio_model.volume_dependent_lr()
