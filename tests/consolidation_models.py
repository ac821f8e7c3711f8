"""A small network and its training, for tests of rules that hold weights back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx

STRENGTH, DAMPING, DECAY = 0.7, 0.05, 0.6
RULE_OF = {
    "synaptic-intelligence": "synaptic_intelligence",
    "elastic": "elastic_consolidation",
    "memory-aware": "memory_aware",
    "upgd": "upgd",
}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}


def net(*, signed: bool = False) -> nn.Module:
    """Biases, a gain and two weights."""
    torch.manual_seed(0)
    layers = (nn.Linear(6, 9), nn.Identity() if signed else nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 3))
    return nn.Sequential(*layers).double()


def made(model: nn.Module | None = None, method: str = "synaptic-intelligence", **options: Any) -> Any:
    """The network, transformed."""
    given: dict[str, Any] = {
        "fuzzy_lr_distribution": "baseline",
        "consolidation": method,
        "consolidation_strength": STRENGTH,
        "consolidation_damping": DAMPING,
        "consolidation_decay": DECAY,
        **options,
    }
    return biofx.transform(net() if model is None else model, biofx.BioConfig(**given))[0]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (12,), generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Of one batch."""
    inputs, target = batch(step)
    return F.cross_entropy(model(inputs), target)


def train(model: Any, optimizer: Any, steps: range) -> None:
    """Take steps."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def state_of(bio: Any, path: str) -> Any:
    """The state of a parameter."""
    owner, _, name = path.rpartition(".")
    state = bio.get_submodule(owner).bio_mod
    return state if name == "weight" else getattr(state, name)


def parameters(model: nn.Module) -> dict[str, Any]:
    """Without what the rules keep."""
    return {name: p for name, p in model.named_parameters() if "bio_mod" not in name}


def close(found: Any, expected: dict[str, Any]) -> None:
    """To 1e-12."""
    for name, parameter in parameters(found).items():
        torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=0, atol=1e-12)


def slopes_of(loss: Tensor, weights: dict[str, Any]) -> dict[str, Tensor]:
    """The gradient on each weight, without a trace of it."""
    found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
    return dict(zip(weights, found, strict=True))


def attached(rule: Any, method: str, **options: Any) -> Any:
    """A model, an optimizer and what runs the rule."""
    bio = made(method=method, **options)
    stepping = OPTIMIZERS["SGD"](bio.parameters())
    return bio, stepping, biofx.attach(bio, stepping, [rule])
