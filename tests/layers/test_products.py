"""Products with a parameter are layers whose weight is stored the other way round, ``(in, out)``."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.layers.constant_part import ConstantPart
from biofx.layers.sites import find_sites

SCALED = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3)
EVERYTHING = SCALED.replace(apply_dales_principle=True, dales_constrain_readout=True)


class Conv1D(nn.Module):
    """A dense layer as GPT-2 has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.zeros(outputs)),
        )

    def forward(self, x: Tensor) -> Any:
        sizes = x.size()[:-1] + (self.outputs,)  # noqa: RUF005
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(sizes)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Conv1D(8, 4), Conv1D(6, 8), Conv1D(3, 6)

    def forward(self, x: Tensor) -> Any:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


class Products(nn.Module):
    """One parameter in a product of each kind."""

    fixed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(4, 4)) for _ in range(4))
        self.register_buffer("fixed", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(x @ self.a)
        x = torch.relu(torch.matmul(x, self.b)) @ self.fixed
        return x.mm(self.c) + torch.addmm(x, x, self.d)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(x) ** 2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["traced", "recorded"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"example_inputs": ((torch.randn(2, 5, 4),), {})} if request.param == "recorded" else {}


def test_gradients_are_scaled_to_the_bit(options: dict[str, Any]) -> None:
    model, x = Net(), torch.randn(3, 7, 4)
    bio_model, report = biofx.transform(model, SCALED, **options)
    assert [entry.applied for entry in report.passes] == [3]
    assert torch.equal(bio_model(x), model(x))
    plain, scaled = gradients(model, x), gradients(bio_model, x)
    for layer in ("first", "second", "third"):
        rates = bio_model.get_submodule(layer).bio_mod.fuzzy_learning_rate_parameters  # type: ignore[union-attr]
        assert isinstance(rates, Tensor)
        assert rates.std() > 0
        assert torch.equal(scaled[f"{layer}.weight"], plain[f"{layer}.weight"] * rates)
        assert torch.equal(scaled[f"{layer}.bias"], plain[f"{layer}.bias"])


def test_a_sign_belongs_to_a_presynaptic_unit_a_row_of_the_weight(options: dict[str, Any]) -> None:
    bio_model, _ = biofx.transform(Net(), EVERYTHING, **options)
    for layer in ("second", "third"):
        owner: Any = bio_model.get_submodule(layer)
        signs = owner.bio_mod.presynaptic_signs()
        assert signs.shape == (owner.weight.shape[0],)
        assert set(signs.tolist()) == {-1, 1}
        (site,) = (site for site in find_sites(bio_model).found if site.layer == layer)
        assert site.weight_node is not None
        used = ConstantPart(bio_model).value(site.weight_node)
        assert bool((used * signs[:, None] >= 0).all())
        assert bool((used != 0).any(1).any())
    assert str(biofx.check(bio_model)).startswith("Net: every invariant holds")
    groups = biofx.unit_groups(biofx.capture(Net(), **options))
    assert [(group.producers, group.readers) for group in groups][1:] == [
        (("first.weight",), ("second.weight",)),
        (("second.weight",), ("third.weight",)),
    ]


def test_signs_of_outputs_are_columns() -> None:
    bio_model, _ = biofx.transform(
        Net(), EVERYTHING.replace(dales_axis="postsynaptic", dales_initialisation="keep")
    )
    second: Any = bio_model.get_submodule("second")
    assert second.bio_mod.local_sign.shape == (1, 6)


def test_outputs_are_split_and_the_function_is_the_definition() -> None:
    model, x = Net(), torch.randn(3, 7, 4)
    bio_model, report = biofx.transform(
        model, biofx.BioConfig(weight_splitting_Gamma=2), passes="split-weights"
    )
    assert [entry.applied for entry in report.passes] == [2]

    def split(y: Tensor) -> Any:
        return y.unflatten(-1, (-1, 2)).sum(-1, keepdim=True).expand(*y.shape[:-1], -1, 2).flatten(-2)

    expected = torch.relu(split(model.first(x)))
    expected = model.third(torch.relu(split(model.second(expected))))
    torch.testing.assert_close(bio_model(x), expected)
    folded, _ = biofx.transform(model, biofx.BioConfig(weight_splitting_Gamma=2))
    torch.testing.assert_close(folded(x), expected)


def test_a_neuron_is_a_column() -> None:
    bio_model, _ = biofx.transform(Net(), SCALED.replace(fuzzy_lr_granularity="neuron"))
    first: Any = bio_model.get_submodule("first")
    assert first.bio_mod.fuzzy_learning_rate_parameters.shape == (1, 8)
    assert first.bio_mod.output_axis == 1
    assert copy.deepcopy(bio_model).get_submodule("first").bio_mod.output_axis == 1  # type: ignore[union-attr]


def test_which_products_are_layers() -> None:
    captured = biofx.capture(Products())
    found = {site.parameter_path: site for site in find_sites(captured).found}
    assert {path: site.kind.name for path, site in found.items()} == {"a": "matmul", "b": "matmul", "c": "mm"}
    assert all((site.input_channels, site.output_channels) == (4, 4) for site in found.values())


class Unlike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.stack, self.scaled = (
            nn.Parameter(torch.randn(4, 4)),
            nn.Parameter(torch.randn(3, 4, 4)),
            nn.Parameter(torch.randn(4, 4)),
        )
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        return self.left @ x, x @ self.stack, torch.addmm(self.bias, x, self.scaled, alpha=-1)


def test_what_is_no_dense_layer_has_no_units() -> None:
    assert [site for site in find_sites(biofx.capture(Unlike())).found if not site.why_no_channels] == []


def test_deployed_and_saved() -> None:
    model, x = Net(), torch.randn(3, 7, 4)
    bio_model, _ = biofx.transform(model, EVERYTHING)
    deployed: Any = biofx.deploy(bio_model)
    torch.testing.assert_close(deployed(x), bio_model(x))
    assert not any("biofx" in str(getattr(node.target, "__module__", "")) for node in deployed.graph.nodes)
    file = io.BytesIO()
    torch.save(bio_model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), bio_model(x))
    other, _ = biofx.transform(Net(), EVERYTHING)
    other.load_state_dict(bio_model.state_dict())
    assert torch.equal(other(x), bio_model(x))
