from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biofx.errors import PlasticityError
from biofx.plasticity.binding import find_way
from biofx.plasticity.optimizer_trial import kinds_of
from biofx.plasticity.optimizers import refuse_closures
from tests.plasticity.displacements import Make, errors


def way(cls: Any, shape: tuple[int, ...] = (4, 3), **options: Any) -> str:
    weight = nn.Parameter(torch.ones(shape))
    optimizer = cls([weight], **options)
    return find_way(optimizer, optimizer.param_groups[0], kinds_of([weight]))[0].value


TORCH: dict[str, tuple[Make, str]] = {
    "SGD": (lambda ps: torch.optim.SGD(ps, lr=0.1), "gradient"),
    "momentum": (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), "gradient"),
    "Nesterov": (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True), "gradient"),
    "decaying": (lambda ps: torch.optim.SGD(ps, lr=0.1, weight_decay=1e-4), "update"),
    "ASGD": (torch.optim.ASGD, "update"),  # its lambd is not 0
    "plain ASGD": (lambda ps: torch.optim.ASGD(ps, lambd=0.0), "gradient"),
    **{
        name: (getattr(torch.optim, name), "update")
        for name in (
            *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax"),
            *("NAdam", "RAdam", "RMSprop", "Rprop"),
        )
    },
    "amsgrad": (lambda ps: torch.optim.Adam(ps, amsgrad=True), "update"),
    "Muon": (lambda ps: torch.optim.Muon(ps, lr=0.02), "update"),
}


@pytest.mark.parametrize("name", TORCH)
def test_weights_move_in_proportion_to_their_rates(name: str) -> None:
    make, expected = TORCH[name]
    assert max(errors(make, convolution=name != "Muon")) <= 0.02
    assert way(make) == expected


def test_all_of_torch_is_in_the_table() -> None:
    classes = {name for name, cls in vars(torch.optim).items() if isinstance(cls, type)}
    elsewhere = {"Optimizer", "LBFGS", "SparseAdam"}
    assert {name for name in classes if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)} == (
        {name for name in TORCH if name in classes} | elsewhere
    )


class TrustRatio(torch.optim.Optimizer):
    """Steps matrices relative to their size, and vectors as plain descent does."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                ratio = parameter.norm() / parameter.grad.norm() if parameter.dim() > 1 else 1.0
                parameter.sub_(group["lr"] * ratio * parameter.grad)


def test_parameters_of_the_kind_that_is_stepped_are_tried() -> None:
    assert way(TrustRatio, (4,)) == "gradient"
    assert way(TrustRatio, (4, 3)) == way(TrustRatio, (4, 3, 3, 3)) == "update"


@pytest.mark.parametrize("lr", [0.0, 1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_learning_rate_does_not_matter_nor_does_its_kind(cls: Any, lr: float) -> None:
    expected = "gradient" if cls is torch.optim.SGD else "update"
    assert way(cls, lr=lr, weight_decay=0.0) == expected
    assert way(cls, lr=torch.tensor(lr), foreach=False, weight_decay=0.0) == expected


def test_sparse_gradients_are_tried_where_dense_ones_fail() -> None:
    assert way(torch.optim.SparseAdam) == "update"


class Late(torch.optim.SGD):
    """Plain descent, until squared gradients that it has gathered come into play."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state["squares"] = state.get("squares", 0) + parameter.grad.square()
                scale = state["squares"].sqrt() if state["step"] > 1000 else 1.0
                parameter.sub_(group["lr"] * parameter.grad / scale)


def test_what_is_not_linear_yet_remembered_will_act_one_day() -> None:
    assert way(Late, lr=0.1) == "update"


class LookingBack(torch.optim.SGD):
    """Goes back half of the way to where it was, every seventh step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                slow = state.setdefault("slow", parameter.clone())
                parameter.sub_(group["lr"] * parameter.grad.sign())
                if state["step"] % 7 == 0:
                    slow.lerp_(parameter, 0.5)
                    parameter.copy_(slow)


def test_steps_that_come_back_to_kept_positions_are_refused() -> None:
    with pytest.raises(PlasticityError, match=r"under LookingBack .* not move in proportion .* use another"):
        way(LookingBack, lr=0.1)


class Broken(torch.optim.SGD):
    def step(self, closure: Any = None) -> Tensor | None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))
        return None


class Still(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change nothing."""


@pytest.mark.parametrize("cls", [Broken, Still])
def test_steps_that_are_not_finite_are_refused(cls: Any) -> None:
    with pytest.raises(
        PlasticityError, match=rf"{cls.__name__} moved small weights .*; expected finite steps"
    ):
        way(cls, lr=0.1)


class Failing(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise KeyError("mask")


def test_failures_are_ours_and_name_the_optimizer_and_the_remedy() -> None:
    with pytest.raises(
        PlasticityError, match=r"Failing cannot be tried .* 2 axes: KeyError: 'mask'; use another"
    ):
        way(Failing, lr=0.1)


class Loud(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        warnings.warn("deprecated", stacklevel=1)
        super().step()


def test_warnings_of_an_optimizer_decide_nothing() -> None:
    assert way(Loud, lr=0.1) == "gradient"


def test_line_search_is_refused() -> None:
    with pytest.raises(PlasticityError, match=r"LBFGS searches along a line .* use another optimizer"):
        way(torch.optim.LBFGS)
    refuse_closures(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_optimizer_and_global_state_are_left_alone() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.grad = torch.ones(3)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # replaces optimizer.step on the instance
    before = weight.detach().clone(), repr(optimizer.state_dict()), torch.get_rng_state()
    find_way(optimizer, optimizer.param_groups[0], kinds_of([weight]))
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
    assert find_way(optimizer, optimizer.param_groups[0], kinds_of([weight]))[0].value == "update"
    assert torch.equal(weight, torch.ones(3))
    assert torch.equal(weight.grad, torch.full((3,), 5.0))
    assert optimizer.seen == {"steps": 0}
