"""The models that trials choose from, with their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fuzz.models import (
    Adapted,
    Attends,
    Branches,
    Counts,
    Deep,
    FrozenNorm,
    Loop,
    MaskedLoop,
    Merges,
    Net,
    Noisy,
    Reparametrised,
    Scaled,
    Tied,
)


def perceptron() -> nn.Module:
    """Three layers."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def normed() -> nn.Module:
    """A layer, a normalisation, dropout, twice."""
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False), nn.LeakyReLU(0.1), nn.Linear(6, 2)),
    )


def convolved() -> nn.Module:
    """Convolutions, a group normalisation, pooling, flattening."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True, affine=True), nn.ELU()),
        *(nn.Flatten(), nn.Dropout1d(0.1), nn.Linear(16, 2)),
    )


def nested() -> nn.Module:
    """Modules that have their say in ``train()``, inside a plain sequence."""
    return nn.Sequential(nn.Linear(4, 4), Noisy(), nn.ReLU(), Merges(), nn.Softplus(), nn.Linear(4, 2))


def of(*shape: int) -> Callable[[int], Tensor]:
    """Inputs of a shape."""
    return lambda samples: torch.randn(samples, *shape)


@dataclass(frozen=True)
class Kind:
    """How a model is made, and its inputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


MODELS = {
    "Net": Kind(Net, of(2, 5, 5)),
    "Scaled": Kind(Scaled, of(4)),
    "Merges": Kind(Merges, of(4)),
    "Noisy": Kind(Noisy, of(4)),
    "FrozenNorm": Kind(FrozenNorm, of(4)),
    "Reparametrised": Kind(Reparametrised, of(2, 5)),
    "Tied": Kind(Tied, lambda samples: torch.randint(7, (samples, 3))),
    "Attends": Kind(Attends, of(3, 4)),
    "Loop": Kind(Loop, of(3, 2)),
    "MaskedLoop": Kind(MaskedLoop, of(3, 2)),
    "Counts": Kind(Counts, of(4)),
    "Deep": Kind(Deep, of(4)),
    "Adapted": Kind(Adapted, of(4)),
    "Branches": Kind(Branches, of(4)),
    "perceptron": Kind(perceptron, of(4)),
    "normed": Kind(normed, of(4)),
    "convolved": Kind(convolved, of(2, 8, 8)),
    "nested": Kind(nested, of(4)),
}
"""By name; others are random."""
