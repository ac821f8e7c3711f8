"""A process group of one: what happens on each rank, without the others; those are in test_distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.fsdp import fully_shard

import biofx
from biofx.operators.rate_ops import scale_gradient


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(mlp: nn.Module) -> tuple[Any, Tensor, Tensor]:
    """Return a sharded model, and the gradients of its first weight with and without factors."""
    bio_model: Any = biofx.transform(mlp, biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.3))[0]
    loss_of(bio_model).backward()
    scaled = bio_model.get_parameter("0.weight").grad
    assert scaled is not None
    plain = scaled / bio_model.get_buffer("0.bio_mod.fuzzy_learning_rate_parameters")
    bio_model.zero_grad()
    fully_shard(bio_model)
    return bio_model, scaled.clone(), plain


def loss_of(model: Any) -> Any:
    return model(torch.ones(3, 4)).square().sum()


def gradient_of(model: Any) -> Tensor:
    gradient: Any = model.get_parameter("0.weight").grad
    full: Tensor = gradient.full_tensor()
    return full


def test_each_gradient_is_multiplied_once_however_often_they_are_added_up(mlp: nn.Module) -> None:
    bio_model, scaled, _ = sharded(mlp)
    for count in (1, 2, 3):
        loss_of(bio_model).backward()
        torch.testing.assert_close(gradient_of(bio_model), count * scaled)
    factors: Any = bio_model.get_submodule("0").bio_mod.fuzzy_learning_rate_parameters
    assert factors.placements == bio_model.get_parameter("0.weight").placements


def test_a_backward_that_shares_no_gradients_leaves_those_that_are_there(mlp: nn.Module) -> None:
    bio_model, scaled, _ = sharded(mlp)
    loss_of(bio_model).backward()
    bio_model.set_requires_gradient_sync(False)
    loss_of(bio_model).backward()
    torch.testing.assert_close(gradient_of(bio_model), scaled)
    bio_model.set_requires_gradient_sync(True)
    loss_of(bio_model).backward()
    torch.testing.assert_close(gradient_of(bio_model), 3 * scaled)


def test_a_gradient_that_comes_on_top_of_another_unannounced_is_refused(mlp: nn.Module) -> None:
    bio_model, _, _ = sharded(mlp)
    loss_of(bio_model).backward()
    bio_model.set_requires_gradient_sync(False)
    loss_of(bio_model).backward()
    weight = bio_model.get_parameter("0.weight")
    (hook,) = weight._post_accumulate_grad_hooks.values()
    with pytest.raises(biofx.errors.PlasticityError, match="call zero_grad"):
        hook(weight)


# torch asks tensors that are no leaves for gradients, wherever what it compiles is interrupted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model_scales_alike(mlp: nn.Module) -> None:
    bio_model, scaled, plain = sharded(mlp)
    assert not torch.allclose(scaled, plain)
    with torch.no_grad():
        loss_of(bio_model)
    compiled = torch.compile(bio_model, backend="aot_eager")
    loss_of(compiled).backward()
    torch.testing.assert_close(gradient_of(bio_model), scaled)


def test_factors_that_belong_to_no_weight_are_refused(mlp: nn.Module) -> None:
    bio_model, _, _ = sharded(mlp)
    loss_of(bio_model)
    factors = bio_model.get_submodule("0").bio_mod.fuzzy_learning_rate_parameters
    with pytest.raises(biofx.errors.PlasticityError, match="expected factors, or a mask, that belong"):
        scale_gradient(torch.zeros(6, 4), factors.clone())


def test_shared_factors_that_a_rule_dampens_for_each_synapse(mlp: nn.Module) -> None:
    config = biofx.BioConfig(fuzzy_lr_granularity="neuron", crystal_thresh=1e9, dampening_factor=0.5)
    bio_model: Any = biofx.transform(mlp, config)[0]
    fully_shard(bio_model)
    optimizer = torch.optim.SGD(bio_model.parameters(), lr=0.1)
    plasticity = biofx.attach(bio_model, optimizer, [biofx.Rule("crystallize", after=1)])
    state = bio_model.get_submodule("0").bio_mod
    before = state.fuzzy_learning_rate_parameters.full_tensor()
    assert before.shape == (6, 1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(bio_model).backward()
        optimizer.step()
    assert torch.equal(state.fuzzy_learning_rate_parameters.full_tensor(), before)
    dampening = state.memory.dampening.full_tensor()
    assert dampening.shape == (6, 4)
    assert (dampening < 1).any()
    plasticity.detach()
    # what was not noticed by any rule acts in the graph, at once
    optimizer.zero_grad()
    loss_of(bio_model).backward()
    found = gradient_of(bio_model)
    state.fuzzy_learning_rate_parameters.to_local().mul_(2)
    optimizer.zero_grad()
    loss_of(bio_model).backward()
    torch.testing.assert_close(gradient_of(bio_model), 2 * found)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model_projects_what_arrives(mlp: nn.Module) -> None:
    config = biofx.BioConfig(apply_dales_principle=True, dales_constrain_inputs=True, weight_density=0.7)
    bio_model: Any = biofx.transform(mlp, config)[0]
    loss_of(bio_model).backward()
    expected = bio_model.get_parameter("0.weight").grad.clone()
    bio_model.zero_grad()
    fully_shard(bio_model)
    compiled = torch.compile(bio_model, backend="aot_eager")
    for model in (bio_model, compiled):
        loss_of(model).backward()
        torch.testing.assert_close(gradient_of(bio_model), expected)
        bio_model.zero_grad()
