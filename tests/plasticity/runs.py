"""A small run: model, optimizer, and steps on data that a seed tells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import biofx


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def fresh(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return biofx.transform(mlp(), {"fuzzy_learning_rate_factor_nu": 0.5, **options}).graph_module


def state_of(model: nn.Module, layer: str = "0") -> biofx.BioModule:
    state = model.get_submodule(layer).bio_mod
    assert isinstance(state, biofx.BioModule)
    return state


def factors_of(model: nn.Module, layer: str = "0") -> Tensor:
    factors = state_of(model, layer).fuzzy_learning_rate_parameters
    assert factors is not None
    return factors


def batches(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(16, 6, generator=generator)


def train(model: nn.Module, optimizer: Any, steps: int = 1, seed: int = 1) -> None:
    for x in itertools.islice(batches(seed), steps):
        optimizer.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimizer.step()


def assert_scaled(model: nn.Module, optimizer: Any, layer: str = "0") -> None:
    """Take one step, and check that a layer moved by its factors times what a step of ones would have."""
    weight = model.get_parameter(f"{layer}.weight")
    kept, start = factors_of(model, layer).clone(), weight.detach().clone()
    train(model, optimizer)
    moved = weight.detach() - start
    pair = torch.stack([moved.abs().flatten(), kept.flatten()])
    # Adam's first step has one size for all
    assert torch.corrcoef(pair)[0, 1] > 0.999
