"""How a model computes and learns after what happened to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Named = dict[str, Tensor]
Gradients = Callable[[Tensor], Named]


@dataclass
class Arrived:
    """A model after its journey: how it computes, and what rules can be attached to."""

    forward: Callable[[Tensor], Tensor]
    gradients: Gradients
    module: nn.Module
    tolerance: float = 1e-5


def loss_of(output: Tensor) -> Tensor:
    """The loss whose gradients are compared."""
    return (output - 1).square().sum()


def named_gradients(module: nn.Module) -> Named:
    """Gradients by the names that the original gave the parameters."""
    found = {}
    for name, parameter in module.named_parameters():
        gradient: Any = parameter.grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name.removeprefix("module.").removeprefix("_orig_mod.")] = whole
    return found


def by_backward(module: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> Gradients:
    """Gradients as a training loop gets them."""

    def gradients(x: Tensor) -> Named:
        module.zero_grad()
        loss_of((module if call is None else call)(x)).backward()
        return named_gradients(module)

    return gradients


def arrived(module: nn.Module) -> Arrived:
    """Return what is called and trained as ever."""
    return Arrived(module, by_backward(module), module)


def plain_net() -> nn.Module:
    """Three layers; the random state decides the weights."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


def batch(number: int) -> Tensor:
    """A batch of 8 samples."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(number))


def agree(found: Mapping[str, Any], expected: Mapping[str, Tensor], tolerance: float) -> bool:
    """Whether tensors are equal up to a fraction of the largest entry."""
    return found.keys() >= expected.keys() and all(
        found[name] is not None
        and bool((found[name].detach() - value).abs().max() <= tolerance * (1e-6 + value.abs().max()))
        for name, value in expected.items()
    )
