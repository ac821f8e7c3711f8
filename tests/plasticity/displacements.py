"""How far weights move under an optimizer: without rates, and with a rate for each row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import biofx

RATES = (0.1, 0.25, 0.5, 1.0, 2.0)
STEPS = 25

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "matrix": lambda: nn.Linear(6, 10, bias=False),
    "convolution": lambda: nn.Conv2d(4, 10, 3, bias=False),
}


def wrong_shares(make: Make, layer: str) -> dict[float, float]:
    """Return for each rate how far its rows moved, relative to a plain layer's times the rate: 1 is right.

    The gradients are random, and the same for both; they do not depend on the weights. A rate of 0 is wrong by
    infinity if a bit has moved.

    Raises:
        PlasticityError: attach refuses the optimizer.
    """
    torch.manual_seed(0)
    plain = LAYERS[layer]()
    bio, _ = biofx.transform(nn.Sequential(copy.deepcopy(plain)), {"fuzzy_learning_rate_factor_nu": 0.5})
    rates = torch.tensor(RATES).repeat_interleave(2)
    shaped = rates.reshape(-1, *[1] * (plain.weight.dim() - 1)).expand(plain.weight.shape)
    bio.get_submodule("0").bio_mod.fuzzy_learning_rate_parameters.copy_(shaped)
    weight = bio.get_parameter("0.weight")
    moved = (_run(make, plain, plain.weight, attached=False), _run(make, bio, weight, attached=True))
    wrong = {}
    for rate in RATES:
        bare, scaled = (change[rates == rate] for change in moved)
        if rate == 0:
            wrong[rate] = float("inf") if scaled.count_nonzero() else 0.0
        else:
            wrong[rate] = float((scaled - rate * bare).norm() / (rate * bare).norm())
    return wrong


def _run(make: Make, model: nn.Module, weight: Any, *, attached: bool) -> Tensor:
    start = weight.detach().clone()
    optimizer: Any = make(model.parameters())
    if attached:
        biofx.attach(model, optimizer)
    if any(group.get("train_mode") is False for group in optimizer.param_groups):
        optimizer.train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        # any loss with this gradient with regard to the layer's effective weight
        gradient = torch.randn(weight.shape, generator=generator) + 0.5
        used: Any = model.get_submodule("0").bio_mod if attached else None
        weight.grad = gradient if used is None else gradient * used.fuzzy_learning_rate_parameters
        optimizer.step()
    if any(group.get("train_mode") for group in optimizer.param_groups):
        optimizer.eval()
    return weight.detach() - start  # type: ignore[no-any-return]
