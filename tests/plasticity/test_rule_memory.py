from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx import BioConfig, BioModule
from biofx.errors import PlasticityError
from biofx.plasticity.rule_memory import RuleMemory


def test_numbers_come_back_and_averages_change_nothing() -> None:
    memory = RuleMemory(7, 3, torch.tensor([1.5, 2.25]))
    saved = memory.to_tensor(2)
    assert saved.tolist() == [7, 3, 1.5, 2.25, 7**2 + 3**2 + 1.5**2 + 2.25**2]
    weight = torch.zeros(2, 4)
    back = RuleMemory()
    back.take(saved, 2, weight)
    assert (back.steps, back.events) == (7, 3)
    assert torch.equal(back.target_strength, torch.tensor([1.5, 2.25]))  # type: ignore[arg-type]
    other = RuleMemory(9, 5).to_tensor(2)
    for average in ((saved + other) / 2, saved * 0.9 + other * 0.1, saved.half(), saved[:-1], None, 3):
        back.take(average, 2, weight)
        assert (back.steps, back.events) == (7, 3)
    back.take(other, 2, weight)
    assert (back.steps, back.events, back.target_strength) == (9, 5, None)


def test_a_target_strength_is_that_of_a_weight_which_still_has_these_units() -> None:
    memory = RuleMemory(7, 3, torch.tensor([1.5, 2.25]))
    assert memory.to_tensor(0).tolist() == [7, 3, 7**2 + 3**2]  # of a weight that is computed now
    bio, _ = crystallized(BioConfig())
    state = bio.get_submodule("0.bio_mod")
    torch.nn.utils.parametrizations.weight_norm(bio.get_submodule("0"))
    assert bio.state_dict()["0.bio_mod._extra_state"].numel() == 3
    torch.nn.utils.parametrize.remove_parametrizations(bio.get_submodule("0"), "weight")
    assert torch.equal(bio.state_dict()["0.bio_mod._extra_state"][2:8].float(), state.target_strength)
    bio.get_submodule("0").weight = nn.Parameter(torch.ones(3, 4))
    state.synaptic_scaling()
    assert torch.equal(state.target_strength, torch.full((3,), 4.0))


def crystallized(config: BioConfig) -> tuple[Any, Any]:
    torch.manual_seed(0)
    bio, _ = biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), config)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
    attachment = biofx.attach(bio, optimizer, ["crystallize", "synaptic_scaling", "rejuvenate_weights"])
    bio(torch.ones(3, 4)).square().mean().backward()
    optimizer.step()
    return bio, attachment


@pytest.mark.parametrize("granularity", ["element", "neuron"])
@pytest.mark.parametrize("nu", [0.0, 0.2])
def test_the_attachment_saves_what_rules_remember(nu: float, granularity: str) -> None:
    config = BioConfig(fuzzy_learning_rate_factor_nu=nu, fuzzy_lr_granularity=granularity, crystal_thresh=1e6)
    bio, attachment = crystallized(config)
    other, handle = crystallized(config.replace(crystal_thresh=1e-30))
    state, fresh = (model.get_submodule("0.bio_mod") for model in (bio, other))
    other.load_state_dict(bio.state_dict())
    handle.load_state_dict(copy.deepcopy(attachment.state_dict()))
    assert torch.equal(fresh.acting_factors, state.acting_factors)
    assert (state.acting_factors < 0.7).any()
    assert torch.equal(fresh.target_strength, state.target_strength)
    assert fresh.events == state.events == 1
    assert (state.memory.dampening is None) is (nu > 0 and granularity == "element")


def test_memory_that_does_not_fit_changes_nothing() -> None:
    bio, attachment = crystallized(BioConfig(fuzzy_learning_rate_factor_nu=0))
    before = attachment.state_dict()["memory"]
    for path, entry, message in (
        ("9.weight", before["0.weight"], "found that of '9.weight'"),
        ("2.weight", {**before["2.weight"], "events": -1}, "events: expected a count"),
        ("2.weight", {**before["2.weight"], "dampening": torch.ones(3)}, r"dampening: .* \(2, 6\)"),
        ("2.weight", {"events": 1}, "expected steps, events, target_strength, dampening"),
    ):
        changed = {"0.weight": {**before["0.weight"], "events": 50}, path: entry}
        with pytest.raises(PlasticityError, match=message):
            attachment.load_state_dict({**attachment.state_dict(), "memory": changed})
        assert bio.get_submodule("0.bio_mod").events == 1


def older(state: BioModule, **late: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a state dict as versions did that kept counts and all factors in buffers."""
    saved = {name: value for name, value in state.state_dict().items() if name != "_extra_state"}
    return saved | late


def test_state_dicts_of_older_versions_still_load() -> None:
    signs = torch.tensor([1, -1, 1], dtype=torch.int8)
    layer, count = nn.Linear(2, 3), torch.tensor(4)
    state = BioModule(layer, BioConfig(fuzzy_lr_granularity="neuron"))
    state.sign = torch.ones(3)
    factors = torch.rand(3, 2)
    late = {"steps": count, "events": count + 1, "target_strength": torch.tensor([1.0, 2.0, 3.0])}
    state.load_state_dict(older(state, fuzzy_learning_rate_parameters=factors, sign=signs, **late))
    assert (state.steps, state.events) == (4, 5)
    assert torch.equal(state.target_strength, late["target_strength"])  # type: ignore[arg-type]
    assert state.sign.tolist() == [1, -1, 1]
    assert state.stored_factors is not None
    assert state.stored_factors.shape == (3, 1)
    above = factors > 0.01
    torch.testing.assert_close(state.acting_factors[above], factors[above])  # type: ignore[index]
    without = BioModule(layer)
    without.load_state_dict({"fuzzy_learning_rate_parameters": factors, "events": count})
    torch.testing.assert_close(without.acting_factors, factors)
    assert without.events == 4
