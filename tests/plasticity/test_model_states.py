from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx import BioModule
from biofx.errors import NonFiniteWeightError, PlasticityError
from biofx.plasticity.model_states import apply_rule, bio_modules, exposed_rules, prepare_states


def converted() -> Any:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    return biofx.BioConverter(rejuvenation_turnover=1.0)(model)


def test_states_are_found_by_the_path_of_their_weight() -> None:
    bio = converted()
    assert list(bio_modules(bio)) == ["0.weight", "2.weight"]
    assert bio_modules(bio)["2.weight"] is bio.get_submodule("2").bio_mod
    assert bio_modules(nn.Linear(2, 2)) == {}
    loose = nn.Sequential(BioModule())  # belongs to no layer
    assert bio_modules(loose) == {}


def test_states_are_made_for_every_weight_of_a_graph() -> None:
    bare = biofx.capture(nn.Sequential(nn.Linear(4, 6), nn.Conv1d(1, 1, 3)))
    assert bio_modules(bare) == {}
    states = prepare_states(bare)
    assert list(states) == ["0.weight", "1.weight"]
    assert prepare_states(bare) == states
    with pytest.raises(PlasticityError, match=r"found a Linear; use biofx\.transform or biofx\.BioConverter"):
        prepare_states(nn.Linear(2, 2))


def test_exposed_rules_are_methods_of_the_model() -> None:
    bio = converted()
    assert exposed_rules(bio) == set(BioModule.exposed_functions)
    assert set(BioModule.exposed_functions) >= {
        "fuzzy_learning_rates",
        "update_fuzzy_learning_rates",
        "volume_dependent_lr",
        "crystallize",
        "rejuvenate_weights",
        "enforce_dales_principle",
        "synaptic_scaling",
    }
    for rule in exposed_rules(bio):
        assert callable(getattr(bio, rule))
    assert exposed_rules(nn.Linear(2, 2)) == set()


def test_rule_that_no_layer_offers() -> None:
    with pytest.raises(PlasticityError, match=r"nonsense has nothing to act on \(no layer offers it\)"):
        apply_rule(converted(), "nonsense")


def test_updating_static_factors_is_no_error() -> None:
    reason = "its factors do not change (fuzzy_lr_dynamic=False, or a static distribution)"
    assert converted().update_fuzzy_learning_rates() == {"0.weight": reason, "2.weight": reason}


def test_all_layers_are_checked_before_one_is_changed() -> None:
    bio = converted()
    before = bio.get_parameter("0.weight").detach().clone()
    with torch.no_grad():
        bio.get_parameter("2.weight")[0, 0] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=r"^2\.weight: expected finite weights .* found 1 that"):
        bio.rejuvenate_weights()
    assert torch.equal(bio.get_parameter("0.weight"), before)
    assert bio.get_submodule("0").bio_mod.events == 0
    # a layer that the rule leaves alone anyway may hold what it likes
    bio.get_parameter("2.weight").requires_grad_(False)
    assert bio.rejuvenate_weights() == {"0.weight": 24, "2.weight": "its weight is frozen"}


def test_arguments_reach_the_layers() -> None:
    bio = converted()
    optimizer = torch.optim.Adam(bio.parameters())
    bio(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert bio.rejuvenate_weights(optimizer=optimizer) == {"0.weight": 24, "2.weight": 12}
    for layer in ("0", "2"):
        state = optimizer.state[bio.get_parameter(f"{layer}.weight")]
        assert (state["exp_avg"] == 0).all()


def test_one_graph_scaled_layer_is_enough_to_refuse() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    bio, _ = biofx.transform(model, {}, only="0")
    bio(torch.ones(2, 4)).sum().backward()
    gradient = bio.get_parameter("0.weight").grad
    assert gradient is not None
    kept = gradient.clone()
    with pytest.raises(PlasticityError, match="would apply the factors twice"):
        bio.fuzzy_learning_rates()
    assert torch.equal(gradient, kept)
