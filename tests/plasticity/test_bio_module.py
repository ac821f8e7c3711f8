from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx import BioConfig, Distribution
from biofx.errors import PlasticityError
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import bio_module_at, bio_module_path


def test_state_is_made_beside_the_weight_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    state = bio_module_at(model, "0.weight")
    assert model.get_submodule("0.bio_mod") is state
    assert bio_module_at(model, "0.weight") is state


def test_weights_of_other_names_get_a_place_of_their_own() -> None:
    model = nn.Module()
    model.projection = nn.Parameter(torch.ones(2))
    assert bio_module_path("projection") == "bio_mod.projection"
    state = bio_module_at(model, "projection")
    assert model.get_submodule("bio_mod.projection") is state
    assert state is not model.get_submodule("bio_mod")


def test_name_taken_by_another_module_is_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.bio_mod = nn.ReLU()
    with pytest.raises(PlasticityError, match="at 'bio_mod', found a ReLU"):
        bio_module_at(layer, "weight")


def test_nothing_is_saved_until_there_is_something() -> None:
    state = BioModule()
    assert not state.state_dict()
    state.sign = torch.ones(3, dtype=torch.int8)
    assert list(state.state_dict()) == ["sign"]
    assert not list(state.parameters())


def test_checkpoint_without_state_leaves_it_and_one_with_part_of_it_is_an_error() -> None:
    layer = nn.Linear(2, 2)
    plain = layer.state_dict()
    state = bio_module_at(layer, "weight")
    state.sign = torch.tensor([1, -1], dtype=torch.int8)
    state.fuzzy_learning_rate_parameters = torch.full((2, 2), 0.5)
    layer.load_state_dict(plain)
    assert state.sign.tolist() == [1, -1]
    with pytest.raises(RuntimeError, match=r"Missing key.*bio_mod.fuzzy_learning_rate_parameters"):
        layer.load_state_dict({**plain, "bio_mod.sign": state.sign})


def test_own_layer_by_itself() -> None:
    layer = nn.Linear(30, 20)
    config = BioConfig(fuzzy_learning_rate_factor_nu=0.3, fuzzy_lr_distribution="normal")  # type: ignore[arg-type]
    for parent in (layer, lambda: layer):
        state = BioModule(parent, config)
        assert state.get_parent() is layer
        assert state.weight is layer.weight
        factors = state.fuzzy_learning_rate_parameters
        assert factors is not None
        assert factors.std().item() == pytest.approx(0.3, rel=0.1)
        layer.weight.grad = torch.full((20, 30), 2.0)
        assert state.fuzzy_learning_rates() == 600
        torch.testing.assert_close(layer.weight.grad, 2 * factors)


def test_state_without_a_layer_says_so() -> None:
    with pytest.raises(
        PlasticityError, match=r"belongs to no layer; give it one: BioModule\(layer, config\)"
    ):
        BioModule().get_parent()
    assert not BioModule().is_linked


def test_layer_whose_weight_is_computed_says_so() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    state = BioModule(layer, BioConfig())
    assert state.parameter is None
    assert state.fuzzy_learning_rate_parameters is None
    with pytest.raises(PlasticityError, match="expected a parameter, found a weight that is computed"):
        _ = state.weight
    with pytest.raises(PlasticityError, match="its weight is computed by a parametrization"):
        state.rejuvenate_weights()


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("crystallize", "its weight has no gradient"),
        ("fuzzy_learning_rates", "its weight has no gradient"),
        ("volume_dependent_lr", "its weight has no gradient"),
        ("enforce_dales_principle", "its presynaptic units have no signs"),
        ("update_fuzzy_learning_rates", "its factors do not change"),
    ],
)
def test_rule_that_cannot_act_says_why_and_changes_nothing(rule: str, reason: str) -> None:
    layer = nn.Linear(3, 3)
    state = BioModule(layer, BioConfig())
    before = {name: value.clone() for name, value in state.state_dict().items()}
    assert reason in str(state.why_not(rule))
    with pytest.raises(PlasticityError, match=f"{rule} cannot act on 'weight': {reason}"):
        getattr(state, rule)()
    assert state.state_dict().keys() == before.keys()
    layer.weight.requires_grad_(False)
    if rule != "enforce_dales_principle":
        assert state.why_not(rule) == "its weight is frozen"


def test_rates_are_not_trained_and_follow_the_layer() -> None:
    layer = nn.Linear(3, 3)
    layer.bio_mod = BioModule(layer, BioConfig())
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert list(layer.state_dict()) == [
        *("weight", "bias", "bio_mod.fuzzy_learning_rate_parameters", "bio_mod._extra_state")
    ]
    moved = layer.to("meta")
    assert moved.bio_mod.fuzzy_learning_rate_parameters.is_meta  # type: ignore[union-attr]


def test_layer_can_be_copied_with_its_state() -> None:
    layer: Any = nn.Linear(3, 3)
    layer.bio_mod = BioModule(layer, BioConfig())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.bio_mod.get_parent() is twin
        twin.bio_mod.rejuvenate_weights()
    assert layer.bio_mod.get_parent() is layer
    assert layer.bio_mod.events == 0


def test_counters_and_what_rules_remember_come_back_from_a_checkpoint() -> None:
    config = BioConfig(
        fuzzy_lr_distribution=Distribution.TEMPORAL, fuzzy_lr_dynamic=True, fuzzy_lr_update_freq=1
    )
    layer, fresh = nn.Linear(3, 3), nn.Linear(3, 3)
    layer.bio_mod, fresh.bio_mod = BioModule(layer, config), BioModule(fresh, config)
    layer.weight.grad = torch.full((3, 3), 1e-9)
    layer.bio_mod.update_fuzzy_learning_rates()
    layer.bio_mod.crystallize()
    layer.bio_mod.synaptic_scaling()
    layer.bio_mod.rejuvenate_weights()
    early = {name: value.clone() for name, value in fresh.state_dict().items()}
    fresh.load_state_dict(layer.state_dict())
    assert {name: value.tolist() for name, value in fresh.state_dict().items()} == {
        name: value.tolist() for name, value in layer.state_dict().items()
    }
    assert (fresh.bio_mod.steps, fresh.bio_mod.events) == (1, 2)
    strength = layer.bio_mod.target_strength
    assert isinstance(strength, torch.Tensor)
    assert torch.equal(fresh.bio_mod.target_strength, strength)  # type: ignore[arg-type]
    assert list(early) == list(layer.state_dict())
    fresh.load_state_dict(early)  # and to before anything was remembered
    assert (fresh.bio_mod.steps, fresh.bio_mod.events, fresh.bio_mod.target_strength) == (0, 0, None)


def test_shared_factors_keep_their_shape_whatever_crystallization_does() -> None:
    config = BioConfig(fuzzy_lr_granularity="layer", crystal_thresh=1e6)
    layer, fresh = nn.Linear(3, 4), nn.Linear(3, 4)
    layer.bio_mod, fresh.bio_mod = BioModule(layer, config), BioModule(fresh, config)
    shared = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.weight.grad = torch.full((4, 3), 1e-9)
    layer.bio_mod.crystallize()
    after = layer.state_dict()
    assert {name: value.shape for name, value in after.items()} == {
        name: value.shape for name, value in shared.items()
    }
    fresh.load_state_dict(after)
    fresh.load_state_dict(shared)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict({**shared, "bio_mod.fuzzy_learning_rate_parameters": torch.ones(2, 2)})


def test_signs_keep_their_values_where_memory_is_made_anew() -> None:
    """Else what a loaded state is compared with would be what happens to be in memory."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    made: Any = biofx.transform(
        model, {"apply_dales_principle": True, "dales_constrain_readout": True}
    ).graph_module
    signs = made.get_buffer("0.bio_mod.sign").clone()
    assert signs.abs().eq(1).all()
    state = {name: value.clone() for name, value in made.state_dict().items()}
    state["0.bio_mod.sign"][0] = 0

    ways: tuple[Callable[[Any], Any], ...] = (
        lambda twin: twin.to("meta").to_empty(device="cpu"),
        lambda twin: twin.to_empty(device="cpu"),
        lambda twin: pickle.loads(pickle.dumps(twin.to("meta"))).to_empty(device="cpu"),
    )
    for way in ways:
        back = way(copy.deepcopy(made))
        assert torch.equal(back.get_buffer("0.bio_mod.sign"), signs)
        with pytest.raises(RuntimeError, match="1 of 4 that are none or cancel out"):
            back.load_state_dict(state)
    halved = copy.deepcopy(made).half().get_buffer("0.bio_mod.sign")
    assert torch.equal(halved, signs.half())
    assert halved.dtype is torch.float16


def test_a_state_without_values_is_missing_from_a_checkpoint_that_has_none() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    made: Any = biofx.transform(model).graph_module
    made.load_state_dict(model.state_dict())
    back = copy.deepcopy(made).to("meta").to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.bio_mod\.fuzzy_learning_rate_parameters"):
        back.load_state_dict(model.state_dict())
    back.load_state_dict(made.state_dict())
    back.load_state_dict(model.state_dict())
    name = "2.bio_mod.fuzzy_learning_rate_parameters"
    assert torch.equal(back.get_buffer(name), made.get_buffer(name))
