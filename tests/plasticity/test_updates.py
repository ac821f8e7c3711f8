from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from tests.plasticity.runs import factors_of


def test_mean_of_averaged_descent_moves_by_the_factors_too() -> None:
    rates = torch.tensor([0.0, 0.25, 0.5, 1.0])
    bio, _ = biofx.transform(
        nn.Sequential(nn.Linear(3, 4, bias=False)), {"fuzzy_learning_rate_factor_nu": 0.5}
    )
    factors_of(bio).copy_(rates[:, None].expand(4, 3))
    weight = bio.get_parameter("0.weight")
    start = weight.detach().clone()
    optimizer = torch.optim.ASGD(bio.parameters(), lr=0.01, t0=3, lambd=1e-4)
    assert biofx.attach(bio, optimizer).modes == {"0.weight": "update"}
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        bio(torch.eye(3)).sum().backward()
        optimizer.step()
        seen.append(weight.detach().clone())
    mean = optimizer.state[weight]["ax"]
    # torch takes a weight for the mean up to the second step after t0; from then on each has one share
    torch.testing.assert_close(mean, torch.stack(seen[4:]).mean(0), atol=1e-5, rtol=1e-4)
    assert torch.equal(mean[0], start[0])
    shares = (mean - start).mean(1) / (mean - start).mean(1)[-1]
    torch.testing.assert_close(shares, rates, atol=0.01, rtol=0)


DALE = biofx.BioConfig(
    apply_dales_principle=True,
    dales_method="abs",
    dales_initialisation="keep",
    fuzzy_learning_rate_factor_nu=0,
)


def dale(mlp: nn.Module, **fields: Any) -> biofx.BioGraphModule:
    bio, _ = biofx.transform(mlp, DALE.replace(**fields))
    state = bio.get_submodule("2.bio_mod")
    assert isinstance(state, biofx.BioModule)
    state.enforce_dales_principle()
    return bio


def test_update_is_that_of_exponentiated_gradient(mlp: nn.Module, vectors: Tensor) -> None:
    bio = dale(mlp)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer, updates="exponentiated")
    before = {name: parameter.detach().clone() for name, parameter in bio.named_parameters()}
    bio(vectors).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in bio.named_parameters()}  # type: ignore[union-attr]
    optimizer.step()
    signs = bio.get_submodule("2.bio_mod").signs()  # type: ignore[operator]
    for name, parameter in bio.named_parameters():
        expected = before[name] - 0.1 * gradients[name]
        if name == "2.weight":
            expected = before[name] * torch.exp(-0.1 * gradients[name] * signs)
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("nu", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_no_synapse_changes_its_sign_and_those_at_zero_stay(
    optimizer: Any, nu: float, mlp: nn.Module, vectors: Tensor
) -> None:
    bio = dale(mlp, fuzzy_learning_rate_factor_nu=nu)
    weight = bio.get_parameter("2.weight")
    weight.data[0, 0] = 0
    start = weight.detach().clone()
    training = optimizer(bio.parameters(), lr=0.05)
    biofx.attach(bio, training, updates="exponentiated")
    losses = []
    for _ in range(200):
        training.zero_grad()
        loss = (bio(vectors) - 1).square().mean()
        loss.backward()
        training.step()
        losses.append(loss.item())
        assert torch.equal(weight.sign(), start.sign())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(weight, start)


def test_factors_scale_the_exponent(mlp: nn.Module, vectors: Tensor) -> None:
    bio = dale(mlp, fuzzy_learning_rate_factor_nu=0.3)
    optimizer = torch.optim.Adam(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer, updates="exponentiated")
    weight, state = bio.get_parameter("2.weight"), bio.get_submodule("2.bio_mod")
    assert isinstance(state, biofx.BioModule)
    before = weight.detach().clone()
    bio(vectors).square().sum().backward()
    moving = weight.grad != 0
    optimizer.step()
    exponent = (weight.detach() / before).log() * state.signs() / -0.1
    factors = state.fuzzy_learning_rate_parameters
    assert factors is not None
    direction = exponent.sign()
    torch.testing.assert_close((exponent * direction)[moving], factors[moving], rtol=1e-3, atol=1e-4)


def test_what_it_has_no_meaning_for_is_refused(mlp: nn.Module) -> None:
    plain, _ = biofx.transform(mlp)
    with pytest.raises(biofx.errors.PlasticityError, match=r"expected a model whose units have signs"):
        biofx.attach(plain, torch.optim.SGD(plain.parameters(), lr=0.1), updates="exponentiated")
    bio = dale(mlp)
    with pytest.raises(
        biofx.errors.PlasticityError, match=r"expected weight_decay=0 for '2.weight', found 0.1"
    ):
        biofx.attach(
            bio, torch.optim.SGD(bio.parameters(), lr=0.1, weight_decay=0.1), updates="exponentiated"
        )
    with pytest.raises(biofx.OptionError, match=r"updates: expected one of additive, exponentiated"):
        biofx.attach(bio, torch.optim.SGD(bio.parameters(), lr=0.1), updates="additiv")
