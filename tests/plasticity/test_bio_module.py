from __future__ import annotations

import pytest
import torch
from torch import nn

from biofx.plasticity.bio_module import BioModule, bio_module_at, bio_module_path


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
    with pytest.raises(AttributeError, match="'bio_mod' is taken by a ReLU"):
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
