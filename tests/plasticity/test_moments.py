from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.plasticity.optimizer_step import LayerStep
from biofx.plasticity.optimizers import FIRST_MOMENTS, forget_direction

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
