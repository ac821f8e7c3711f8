"""How far weights move under an optimizer: without rates, and with a rate for each row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import biofx

RATES = (0.1, 0.25, 0.5, 1.0, 2.0)
STEPS = 12

Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


class Layers(nn.Module):
    """A matrix and a convolution, or a matrix alone."""

    def __init__(self, *, convolution: bool) -> None:
        super().__init__()
        self.matrix = nn.Linear(6, 10, bias=False)
        self.convolution = nn.Conv2d(4, 10, 3, bias=False) if convolution else None

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = self.matrix(x[:, 0, 0]).sum()
        if self.convolution is not None:
            summed = summed + self.convolution(x).sum()
        return summed


def errors(make: Make, *, convolution: bool = True, dtype: torch.dtype = torch.float32) -> list[float]:
    """Return for each weight and rate how far its rows are from where they should be, relative to the way.

    They should have moved by the rate times as far as those of a plain model, which gets the same random
    gradients; those depend on no weight.

    Raises:
        PlasticityError: attach refuses the optimizer.
    """
    torch.manual_seed(0)
    plain = Layers(convolution=convolution).to(dtype)
    bio, _ = biofx.transform(copy.deepcopy(plain), {"fuzzy_learning_rate_factor_nu": 0.5})
    rates = torch.tensor(RATES).repeat_interleave(2)
    found = []
    moved = displacements(bio, make, rates), displacements(plain, make, None)
    for scaled, bare in zip(*moved, strict=True):
        for rate in RATES:
            expected = rate * bare[rates == rate]
            found.append(float((scaled[rates == rate] - expected).norm() / expected.norm()))
    return found


def displacements(model: nn.Module, make: Make, rates: Tensor | None) -> list[Tensor]:
    """Return how far some steps move each weight, that of a transformed model by the rates of its rows."""
    torch.manual_seed(2)  # some optimizers draw
    starts = [weight.detach().clone() for weight in model.parameters()]
    optimizer: Any = make(model.parameters())
    factors: list[Any] = [None for _ in starts]
    if rates is not None:
        states = [module for module in model.modules() if isinstance(module, biofx.BioModule)]
        factors = [state.fuzzy_learning_rate_parameters for state in states]
        for factor in factors:
            factor.copy_(rates.reshape(-1, *[1] * (factor.dim() - 1)).expand(factor.shape))
        biofx.attach(model, optimizer)
    switches = any("train_mode" in group for group in optimizer.param_groups)
    if switches:
        optimizer.train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for weight, factor in zip(model.parameters(), factors, strict=True):
            gradient = (torch.randn(weight.shape, generator=generator) + 0.5).to(weight.dtype)
            # as the graph scales it
            weight.grad = gradient if factor is None else gradient * factor.to(weight.dtype)
        optimizer.step()
    if switches:
        optimizer.eval()
    return [weight.detach() - start for weight, start in zip(model.parameters(), starts, strict=True)]
