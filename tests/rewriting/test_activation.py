from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx import passes


def split(model: nn.Module, activation: Any) -> biofx.BioGraphModule:
    return biofx.transform(model, passes=passes.SplitWeights(activation=activation)).graph_module


def by_hand(model: Any, activation: Any, x: Tensor) -> Tensor:
    """The mlp with groups of two units of its hidden layers summed after ``activation``."""
    for place, layer in enumerate(model):
        x = layer(x)
        if place in (0, 2):
            x = activation(x).unflatten(-1, (-1, 2)).sum(-1).repeat_interleave(2, -1)
    return x


def shifted_tanh(x: Tensor) -> Tensor:
    return torch.tanh(x) * 2 - 1


def in_place(x: Tensor) -> Tensor:
    x += 1
    return x.relu_()


FUNCTIONS: list[Any] = [torch.relu, F.softplus, shifted_tanh, lambda x: x.clamp(min=-0.5), in_place]


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_a_function_becomes_nodes(activation: Any, mlp: nn.Module, vectors: Tensor) -> None:
    bio_model = split(mlp, activation)
    assert not any("bio_mod" in name for name, _ in bio_model.named_modules())
    assert any("activated" in node.name for node in bio_model.graph.nodes)
    torch.testing.assert_close(bio_model(vectors), by_hand(mlp, activation, vectors))


SLOPE = torch.tensor(0.3)
OPAQUE: list[Any] = [
    nn.LeakyReLU(0.2),
    lambda x: torch.where(x > 0, x, SLOPE * x),
    lambda x: x if x.sum() > 0 else x * 2,
    lambda x: x * len(x),
]


@pytest.mark.parametrize("activation", OPAQUE)
def test_a_module_and_what_cannot_be_looked_into_becomes_one_call(
    activation: Any, mlp: nn.Module, vectors: Tensor
) -> None:
    bio_model = split(mlp, activation)
    calls = [node.target for node in bio_model.graph.find_nodes(op="call_module")]
    assert [target for target in calls if "bio_mod" in target] == [
        "0.bio_mod.splitting_activation",
        "2.bio_mod.splitting_activation",
    ]
    torch.testing.assert_close(bio_model(vectors), by_hand(mlp, activation, vectors))
    assert torch.equal(copy.deepcopy(bio_model)(vectors), bio_model(vectors))


def test_the_identity_adds_nothing(mlp: nn.Module) -> None:
    plain = biofx.format_graph(biofx.transform(mlp, passes="split-weights").graph_module)
    assert biofx.format_graph(split(mlp, nn.Identity())) == plain


def test_a_stateful_module_is_copied_for_each_layer(mlp: nn.Module, vectors: Tensor) -> None:
    activation = nn.PReLU()
    bio_model = split(mlp, activation)
    names = [name for name, _ in bio_model.named_parameters() if "bio_mod" in name]
    assert names == ["0.bio_mod.splitting_activation.weight", "2.bio_mod.splitting_activation.weight"]
    bio_model(vectors).sum().backward()
    first, second = (bio_model.get_parameter(name) for name in names)
    assert first.grad is not None
    assert second.grad is not None
    assert not torch.equal(first.grad, second.grad)
    assert activation.weight.grad is None


def test_a_module_that_depends_on_the_mode_follows_the_model(mlp: nn.Module, vectors: Tensor) -> None:
    bio_model = split(mlp, nn.Dropout(0.5))
    assert not torch.equal(bio_model(vectors), bio_model(vectors))
    bio_model.eval()
    torch.testing.assert_close(bio_model(vectors), by_hand(mlp, lambda x: x, vectors))


def test_a_layer_called_twice_has_one_activation_module(vectors: Tensor) -> None:
    layer = nn.Linear(4, 4)
    bio_model = split(nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 2)), nn.PReLU())
    assert sum("splitting_activation" in name for name, _ in bio_model.named_modules()) == 1
    calls = [node.target for node in bio_model.graph.find_nodes(op="call_module")]
    assert calls.count("0.bio_mod.splitting_activation") == 2


def test_an_activation_that_changes_the_shape_is_an_error_when_it_runs(
    mlp: nn.Module, vectors: Tensor
) -> None:
    bio_model = split(mlp, lambda x: x[..., :3])
    with pytest.raises(biofx.OptionError, match="an activation that keeps the shape"):
        bio_model(vectors)
