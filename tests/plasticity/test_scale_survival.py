from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biofx import PlasticityError
from biofx.plasticity.scale_survival import keeps_gradient_factors, refuse_closures, scale_survival


def survival(cls: type[torch.optim.Optimizer], **options: Any) -> float:
    optimizer = cls([nn.Parameter(torch.ones(3))], **options)
    return scale_survival(optimizer, optimizer.param_groups[0])


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_plain_descent_keeps_a_factor(options: dict[str, Any]) -> None:
    assert survival(torch.optim.SGD, lr=0.1, **options) == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax])
def test_scale_free_optimizers_lose_a_factor(cls: type[torch.optim.Optimizer]) -> None:
    assert survival(cls, lr=1e-3) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    "cls",
    [
        *(torch.optim.Adagrad, torch.optim.Rprop, torch.optim.RMSprop, torch.optim.Adadelta),
        torch.optim.RAdam,  # not scale-free before its first rectified step, and from then on
    ],
)
def test_others_lose_most_of_it(cls: type[torch.optim.Optimizer]) -> None:
    assert -0.01 < survival(cls) < 0.5
    optimizer = cls([nn.Parameter(torch.ones(3))])  # type: ignore[call-arg]
    assert not keeps_gradient_factors(optimizer, optimizer.param_groups[0])


@pytest.mark.parametrize("lr", [0.0, 1e-12, 1e-7, 1e-3, 10.0])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_learning_rate_does_not_matter_nor_does_its_kind(cls: type[torch.optim.Optimizer], lr: float) -> None:
    expected = 1.0 if cls is torch.optim.SGD else 0.0
    assert survival(cls, lr=lr) == pytest.approx(expected, abs=0.01)
    assert survival(cls, lr=torch.tensor(lr), foreach=False) == pytest.approx(expected, abs=0.01)


def test_weight_decay_and_maximising_do_not_matter() -> None:
    assert survival(torch.optim.SGD, lr=0.1, weight_decay=0.3, maximize=True) == pytest.approx(1, abs=0.001)


def test_optimizer_and_global_state_are_left_alone() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.grad = torch.ones(3)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # replaces optimizer.step on the instance
    before = weight.detach().clone(), repr(optimizer.state_dict()), torch.get_rng_state()
    scale_survival(optimizer, optimizer.param_groups[0])
    assert torch.equal(weight, before[0])
    assert torch.equal(weight.grad, torch.ones(3))
    assert repr(optimizer.state_dict()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not calls


class Signed(torch.optim.Optimizer):
    """An optimizer with attributes of its own, one of which knows the model's parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.power = 1.0
        self.seen: dict[str, int] = {"steps": 0}
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=lr)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.seen["steps"] += 1
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.sign_().mul_(self.power)
        self.inner.step()


def test_own_attributes_are_there_and_the_models_weights_are_not() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 5.0)
    optimizer = Signed([weight], lr=0.1)
    assert scale_survival(optimizer, optimizer.param_groups[0]) == pytest.approx(0, abs=0.01)
    assert torch.equal(weight, torch.ones(3))
    assert torch.equal(weight.grad, torch.full((3,), 5.0))
    assert optimizer.seen == {"steps": 0}


class Broken(torch.optim.SGD):
    def step(self, closure: Any = None) -> Tensor | None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))
        return None


@pytest.mark.parametrize("cls", [Broken])
def test_steps_that_are_not_finite_are_refused(cls: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(PlasticityError, match=r"Broken moved a small parameter by .*; expected finite steps"):
        survival(cls, lr=0.1)


def test_line_search_is_refused() -> None:
    with pytest.raises(PlasticityError, match=r"LBFGS searches along a line .* use another optimizer"):
        survival(torch.optim.LBFGS)
    refuse_closures(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
