"""Networks for images of any shape with ten classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.demo import Block

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""


def perceptron(shape: Shape = (1, 8, 8), width: int = 64) -> nn.Module:
    """Return a network of four hidden layers for ``(batch, *shape)``."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    first = nn.Linear(math.prod(shape), width)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), *hidden, nn.Linear(width, 10))


def dense(shape: Shape, *widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Return a network of fully connected hidden layers of these widths for ``(batch, *shape)``."""
    sizes = [math.prod(shape), *widths]
    hidden = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


class ResidualNet(nn.Module):
    """Two residual blocks, each before a pooling; returns ``(batch, 10)`` logits."""

    def __init__(self, shape: Shape, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(shape[0], width, 3, padding=1)
        self.block1 = Block(width)
        self.block2 = Block(width)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.readout = nn.Linear(width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of ``(batch, channels, height, width)``."""
        x = F.max_pool2d(self.block1(torch.relu(self.stem(x))), 2)
        logits: Tensor = self.readout(self.pool(self.block2(x)).flatten(1))
        return logits


@dataclass(frozen=True)
class Network:
    """What makes a network, and for how many epochs it learns unless it is said otherwise."""

    make: Callable[[Shape], nn.Module]
    epochs: int


NETWORKS = {"perceptron": Network(perceptron, 30), "residual": Network(ResidualNet, 12)}
