"""Embeddings and bilinear layers: their gradients are scaled; signs and splitting mean nothing there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.layers.sites import find_sites
from biofx.plasticity.model_states import bio_modules

SCALED = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3)
EVERYTHING = SCALED.replace(
    apply_dales_principle=True, dales_constrain_readout=True, weight_splitting_Gamma=2
)


class Words(nn.Module):
    """Looks up in all ways that there are, one of them tied to the readout."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8, padding_idx=0, **options)
        self.places = nn.Embedding(5, 8, scale_grad_by_freq=True)
        self.bag = nn.EmbeddingBag(10, 8, mode="sum", include_last_offset=False)
        self.hidden, self.both = nn.Linear(8, 8), nn.Bilinear(8, 8, 4)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Any:
        x = self.words(ids) + self.places(torch.arange(5))
        h = torch.relu(self.hidden(x))
        return self.head(h), self.both(h, x), self.bag(ids, per_sample_weights=None)


def ids_of(batch: int) -> Tensor:
    ids = torch.randint(1, 10, (batch, 5), generator=torch.Generator().manual_seed(batch))
    ids[0, 0] = 0
    return ids


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(ids)
    sum((output**2).sum() for output in outputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recorded", [False, True])
def test_outputs_and_gradients_with_everything_off_are_equal(recorded: bool) -> None:
    model = Words()
    options: dict[str, Any] = {"example_inputs": ((ids_of(2),), {})} if recorded else {}
    bio_model, _ = biofx.transform(model, SCALED.replace(fuzzy_learning_rate_factor_nu=0.0), **options)
    for batch in (2, 3):
        torch.testing.assert_close(bio_model(ids_of(batch)), model(ids_of(batch)), rtol=0, atol=0)
        found, expected = gradients(bio_model, ids_of(batch)), gradients(model, ids_of(batch))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("recorded", [False, True])
def test_gradients_are_scaled_to_the_bit_and_once_for_both_uses(recorded: bool) -> None:
    model = Words()
    options: dict[str, Any] = {"example_inputs": ((ids_of(2),), {})} if recorded else {}
    bio_model, report = biofx.transform(model, SCALED, **options)
    assert [entry.missed for entry in report.passes] == [0]
    torch.testing.assert_close(bio_model(ids_of(3)), model(ids_of(3)), rtol=0, atol=0)
    plain, scaled = gradients(model, ids_of(3)), gradients(bio_model, ids_of(3))
    for layer in ("words", "places", "bag", "hidden", "both"):
        state: Any = bio_model.get_submodule(layer).bio_mod
        rates = state.fuzzy_learning_rate_parameters
        assert rates.std() > 0
        assert torch.equal(scaled[f"{layer}.weight"], plain[f"{layer}.weight"] * rates), layer
    assert report.coverage is not None
    assert report.coverage.rewritten == report.coverage.total - 8 - 4  # two biases
    states = [name for name in bio_model.state_dict() if name.endswith("fuzzy_learning_rate_parameters")]
    assert len(states) == 5


def test_padding_is_not_trained() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=0), nn.Linear(8, 2))
    bio_model, _ = biofx.transform(model, SCALED)
    gradient = gradients(nn.Sequential(bio_model, nn.Unflatten(0, (1, -1))), ids_of(3))["0.0.weight"]
    assert not gradient[0].any()
    assert gradient[1:].any()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "its forward changes its weight in place (max_norm)"),
        ({"sparse": True}, "its gradient is sparse, and factors are dense (sparse=True)"),
    ],
)
def test_what_cannot_be_scaled_is_told(options: dict[str, Any], reason: str) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(10, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.table, **options)

    for model in (nn.Sequential(nn.Embedding(10, 8, **options), nn.Linear(8, 2)), Functional()):
        _, report = biofx.transform(model, SCALED)
        remarks = {remark.message for entry in report.passes for remark in entry.remarks}
        assert reason in remarks
        assert report.coverage is not None
        assert reason in {entry.reason for entry in report.coverage.left}


def test_signs_splits_and_expansion_leave_them_alone_with_a_reason() -> None:
    for config in (EVERYTHING, EVERYTHING.replace(dales_method="expand")):
        model = Words()
        bio_model, report = biofx.transform(model, config)
        assert bio_model.words.weight.shape == (10, 8)
        told: dict[str, list[str]] = {}
        for entry in report.passes:
            for remark in entry.remarks:
                if remark.kind == "missed":
                    told.setdefault(f"{entry.name} {remark.node}", []).append(remark.message)
        looked_up = "its rows are looked up, and no unit is presynaptic to them"
        assert told["split-weights words"] == [looked_up]
        assert told["split-weights both"][0].startswith("each of its weights has two presynaptic units")
        assert told["constrain-signs words"] == [f"{looked_up}, which could have a sign"]
        assert told["constrain-signs head"] == [
            "its weight is also read by 'words', where signs mean nothing"
        ]
        assert {fault.invariant for fault in biofx.check(bio_model).faults} == {"asked"}


def test_rules_on_synapses_leave_them_alone() -> None:
    bio_model, _ = biofx.transform(Words(), SCALED)
    gradients(bio_model, ids_of(2))
    state: Any = bio_model.get_submodule("words").bio_mod
    for rule in ("rejuvenate_weights", "synaptic_scaling"):
        assert state.why_not(rule) == "its rows are looked up, and no unit is presynaptic to them"
    for rule in ("volume_dependent_lr", "crystallize"):
        assert state.why_not(rule) is None
    before = state.weight.detach().clone()
    replaced = biofx.plasticity.model_states.apply_rule(bio_model, "rejuvenate_weights")
    assert isinstance(replaced["hidden.weight"], int)
    assert torch.equal(state.weight, before)
    assert copy.deepcopy(bio_model).get_submodule("words").bio_mod.why_no_synapses  # type: ignore[union-attr]


def test_a_neuron_is_a_column_of_an_embedding() -> None:
    bio_model, _ = biofx.transform(Words(), SCALED.replace(fuzzy_lr_granularity="neuron"))
    states: dict[str, Any] = dict(bio_modules(bio_model))
    shapes = {
        layer: tuple(states[f"{layer}.weight"].fuzzy_learning_rate_parameters.shape)
        for layer in ("words", "bag", "both")
    }
    assert shapes == {"words": (1, 8), "bag": (1, 8), "both": (4, 1, 1)}


def test_they_deploy_to_what_they_were() -> None:
    model = Words()
    bio_model, _ = biofx.transform(model, EVERYTHING)
    deployed: Any = biofx.deploy(bio_model)
    torch.testing.assert_close(deployed(ids_of(3)), bio_model(ids_of(3)))
    called = {
        node.target: deployed.get_submodule(str(node.target))
        for node in deployed.graph.nodes
        if node.op == "call_module"
    }
    for layer in ("words", "places", "bag", "both"):
        module, was = called[layer], model.get_submodule(layer)
        assert type(module) is type(was)
        assert str(module) == str(was)
    assert find_sites(deployed).found
