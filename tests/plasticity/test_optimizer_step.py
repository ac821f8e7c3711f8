from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import PlasticityError
from tests.plasticity.runs import batches, factors_of, fresh, train


def backward(bio: nn.Module) -> dict[str, Tensor]:
    bio.zero_grad()
    bio(next(batches(1))).square().mean().backward()
    return {name: p.grad.clone() for name, p in bio.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("door", ["transform", "converter"])
@pytest.mark.parametrize("schedule", [[], ["crystallize", "volume_dependent_lr"]])
@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: torch.optim.Adam(ps, foreach=True),
        lambda ps: torch.optim.Adam(ps, fused=True),
        torch.optim.Adagrad,
    ],
)
def test_gradients_are_as_the_backward_left_them(make: Any, schedule: list[str], door: str) -> None:
    bio = fresh()
    if door == "converter":
        bio = biofx.BioConverter(fuzzy_learning_rate_factor_nu=0.5)(nn.Sequential(nn.Linear(6, 8), nn.Tanh()))
    optimizer = make(bio.parameters())
    biofx.attach(bio, optimizer, schedule)
    left = backward(bio)
    held = {name: parameter.grad for name, parameter in bio.named_parameters()}
    for _ in range(2):
        optimizer.step()
    for name, parameter in bio.named_parameters():
        assert parameter.grad is held[name]
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, left[name]), name
    backward_again: dict[str, Tensor] = {}

    def closure() -> Tensor:
        backward_again.update(backward(bio))
        return torch.zeros(())

    optimizer.step(closure)
    for name, parameter in bio.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, backward_again[name]), name


def test_steps_without_new_gradients_apply_each_factor_once() -> None:
    bio = biofx.BioConverter(fuzzy_learning_rate_factor_nu=0.5)(nn.Sequential(nn.Linear(6, 8)))
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.5)
    biofx.attach(bio, optimizer)
    weight = bio.get_parameter("0.weight")
    weight.grad, start = torch.ones(8, 6), weight.detach().clone()
    for _ in range(3):
        optimizer.step()
    torch.testing.assert_close(weight.detach(), start - 3 * 0.5 * factors_of(bio))


class Clipped(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Twice(Clipped):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("cls", [Clipped, Twice])
def test_step_that_calls_its_parents_is_one_step(cls: Any, with_closure: bool) -> None:
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)  # from now on the parent's step runs hooks
    bio = fresh()
    optimizer = cls(bio.parameters(), lr=0.1)
    seen: list[int] = []
    plasticity = biofx.attach(bio, optimizer, observers=[lambda step, _: seen.append(step)])
    weight = bio.get_parameter("0.weight")
    start = weight.detach().clone()
    gradient = backward(bio)["0.weight"]
    if with_closure:
        optimizer.step(lambda: backward(bio)["0.bias"].sum())
    else:
        optimizer.step()
    assert plasticity.steps == 1
    assert seen == [0]
    torch.testing.assert_close(weight.detach(), start - 0.1 * gradient)  # as the graph scaled it


class Failing(Clipped):
    fails = False

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.fails:
            raise ArithmeticError
        return result


def test_step_that_fails_outside_its_parent_leaves_the_next_one_sound() -> None:
    runs = []
    for fails in (False, True):
        bio = fresh()
        optimizer = Failing(bio.parameters(), lr=0.0)
        plasticity = biofx.attach(bio, optimizer, ["volume_dependent_lr"])
        optimizer.fails = fails
        if fails:
            with pytest.raises(ArithmeticError):
                train(bio, optimizer)
            optimizer.fails = False
        else:
            train(bio, optimizer)
        optimizer.param_groups[0]["lr"] = 0.1
        before = plasticity.steps
        train(bio, optimizer)
        assert plasticity.steps == before + 1
        runs.append(bio.get_parameter("0.weight"))
    assert torch.equal(*runs)


def test_optimizer_that_evaluates_its_closure_twice_is_refused() -> None:
    class Corrected(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if closure is not None:
                closure()
            return super().step(closure)

    bio = fresh()
    optimizer = Corrected(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    with pytest.raises(PlasticityError, match="evaluates the model several times a step"):
        optimizer.step(lambda: backward(bio)["0.bias"].sum())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_factor_that_becomes_zero_freezes_whatever_momentum_there_is(momentum: float) -> None:
    bio = fresh(fuzzy_lr_min=0.0)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1, momentum=momentum)
    assert biofx.attach(bio, optimizer).modes["0.weight"] == "gradient"
    train(bio, optimizer, 3)
    factors_of(bio)[:4] = 0
    weight = bio.get_parameter("0.weight")
    before = weight.detach().clone()
    train(bio, optimizer, 3)
    assert torch.equal(weight[:4], before[:4])
    assert (weight[4:] != before[4:]).all()
