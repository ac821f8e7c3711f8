from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.errors import PlasticityError
from biofx.plasticity.optimizer_step import LayerStep
from biofx.plasticity.optimizers import (
    FIRST_MOMENTS,
    decoupled_decay,
    forget_direction,
    has_decay,
    signature,
    without_decay,
)
from tests.plasticity.runs import fresh

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_direction_is_forgotten_there_and_nothing_else(name: str, memory: torch.memory_format) -> None:
    cls, options = OPTIMIZERS[name]
    weight = nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=memory))
    optimizer = cls([weight], lr=0.01, **options)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        weight.grad = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=memory)
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[weight].items() if torch.is_tensor(value)}
    places = torch.tensor([0, 7, 46])
    forget_direction(optimizer, weight, places)
    for key, value in optimizer.state[weight].items():
        if not torch.is_tensor(value):
            continue
        expected = before[key].clone()
        if key in FIRST_MOMENTS:
            assert (expected != 0).all()
            for place in places.tolist():
                expected[place // 12, place // 4 % 3, place // 2 % 2, place % 2] = 0
        assert torch.equal(value, expected), key


def test_optimizer_without_state_has_nothing_to_forget() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight])
    forget_direction(optimizer, weight, torch.tensor([1]))
    assert not optimizer.state


def average_step(forget: str) -> float:
    """|update| / lr of replaced synapses at Adam's next step, with small noisy gradients."""
    weight = nn.Parameter(torch.zeros(20_000))
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        weight.grad = torch.randn(20_000, generator=generator)
        optimizer.step()
    everywhere = torch.arange(20_000)
    if forget != "nothing":
        forget_direction(optimizer, weight, everywhere)
    if forget == "both":
        optimizer.state[weight]["exp_avg_sq"].zero_()
    before = weight.detach().clone()
    weight.grad = torch.randn(20_000, generator=generator)
    optimizer.step()
    return float((weight.detach() - before).abs().mean() / 1e-3)


def test_new_synapses_take_no_giant_step() -> None:
    """With its second moment kept, a synapse steps as far as one gradient in many is worth, no further."""
    kept, both = average_step("first"), average_step("both")
    # with the first moment gone, m = (1 - b1) g and v = E g²: a step of 0.1 |g| / sqrt(E g²)
    assert kept == pytest.approx(0.1 * (2 / torch.pi) ** 0.5, rel=0.1)
    # with both gone, m = 0.1 g and v = 0.001 g², but for the bias correction of v, long gone too
    correction = (1 - 0.999**301) ** 0.5
    assert both == pytest.approx(0.1 / 0.001**0.5 * correction, rel=0.05)
    assert both > 10 * kept


@pytest.mark.parametrize("front_door", ["method", "attach"])
def test_rejuvenation_tells_the_optimizer(front_door: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bio = biofx.BioConverter(rejuvenation_parameter_dre=1.0)(nn.Sequential(nn.Linear(40, 40)))
    weight = bio.get_parameter("0.weight")
    optimizer = torch.optim.Adam(bio.parameters(), lr=1e-3)
    attachment = None
    seen: dict[str, LayerStep] = {}
    if front_door == "attach":
        rule = biofx.Rule("rejuvenate_weights", after=5)
        attachment = biofx.attach(bio, optimizer, [rule], observers=[lambda _, layers: seen.update(layers)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        optimizer.zero_grad()
        bio(torch.randn(8, 40, generator=generator)).square().mean().backward()
        before = weight.detach().clone()
        optimizer.step()
    if attachment is None:
        before = weight.detach().clone()
        bio.rejuvenate_weights(optimizer)
        replaced = weight != before
    else:
        replaced = optimizer.state[weight]["exp_avg"] == 0
        assert seen["0.weight"].touched["rejuvenate_weights"] == replaced.sum()
    state = optimizer.state[weight]
    assert 400 < replaced.sum() < 1600
    assert (state["exp_avg"][replaced] == 0).all()
    assert (state["exp_avg"][~replaced] != 0).all()
    assert (state["exp_avg_sq"] > 0).all()
    moved = (weight.detach() - before)[replaced].abs()
    assert moved.median() > 0.01  # new weights, and not steps of 0.001
    bias = next(parameter for name, parameter in bio.named_parameters() if name == "0.bias")
    assert (optimizer.state[bias]["exp_avg"] != 0).all()


def test_schedules_do_not_change_the_signature_and_switches_do() -> None:
    group = {"lr": 0.1, "initial_lr": 0.1, "momentum": 0.85, "nesterov": False, "betas": (0.9, 0.999)}
    same: list[dict[str, Any]] = [
        {"lr": 1e-6},
        {"initial_lr": 3.0},
        {"momentum": 0.95},
        {"params": [1]},
        {"betas": (0.95, 0.99)},
    ]
    other: list[dict[str, Any]] = [
        {"momentum": 0.0},
        {"nesterov": True},
        {"betas": (0.0, 0.999)},
        {"eps": 1.0},
        {"momentum": -0.85},
    ]
    assert {signature({**group, **change}) for change in same} == {signature(group)}
    assert len({signature({**group, **change}) for change in other}) == len(other)
    assert signature({**group, "step": 7}, ["step"]) == signature(group)


@pytest.mark.parametrize("name", ["weight_decay", "lambd", "wd", "adamw_wd", "fixed_weight_decay"])
def test_decays_are_found_by_their_names(name: str) -> None:
    assert has_decay({"lr": 0.1, name: 0.1})
    assert not has_decay({"lr": 0.1, name: 0.0, "lr_decay": 0.1, "momentum_decay": 4e-3})
    assert without_decay({"params": [1], "lr": 0.1, name: 0.1}) == {"lr": 0.1, name: 0.0}


def test_decay_that_is_not_decoupled_cannot_act_freely() -> None:
    weight = nn.Parameter(torch.ones(1))
    adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    assert decoupled_decay(adamw, adamw.param_groups[0]) == 0.1 * 0.5
    asgd = torch.optim.ASGD([weight], lambd=0.1)
    with pytest.raises(PlasticityError, match="ASGD mixes weight decay into the gradient"):
        decoupled_decay(asgd, asgd.param_groups[0])


class Outer:
    """What some libraries put around an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


def test_unknown_wrapper_is_refused_with_what_to_attach_to() -> None:
    bio = fresh()
    optimizer = torch.optim.AdamW(bio.parameters())
    with pytest.raises(
        PlasticityError, match=r"found a Outer around it; attach to optimizer.optimizer, the AdamW"
    ):
        biofx.attach(bio, Outer(optimizer))  # type: ignore[arg-type]
    assert biofx.attach(bio, optimizer).modes["0.weight"] == "update"


def test_wrapper_that_trains_copies_is_refused() -> None:
    bio = fresh()
    copies = [parameter.detach().clone().requires_grad_() for parameter in bio.parameters()]
    with pytest.raises(PlasticityError, match="it trains copies, which factors cannot reach"):
        biofx.attach(bio, Outer(torch.optim.SGD(copies, lr=0.1)))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, 3, torch.optim.AdamW, []])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(PlasticityError, match=r"expected an optimizer of torch\.optim's kind, found"):
        biofx.attach(fresh(), wrong)
