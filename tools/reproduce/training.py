"""The protocol: momentum, a learning rate that falls linearly to 0, batches ordered by a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx.plasticity.optimizer_step import Observer
from reproduce.data import Data, Part

GRID = (0.01, 0.02, 0.05, 0.1)
"""Learning rates to choose from."""
BATCH, MOMENTUM = 64, 0.9


def train(
    model: nn.Module,
    data: Data,
    *,
    rate: float,
    epochs: int,
    seed: int,
    rules: Sequence[biofx.Rule] = (),
    observers: Sequence[Observer] = (),
) -> tuple[float, float]:
    """Train a network; return its accuracy on validation and on test images, in percent.

    A rule that finds weights that are no longer finite ends the training, where nothing is left to learn.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    if rules or observers:
        biofx.attach(model, optimizer, rules, observers=observers)
    model.train()
    with contextlib.suppress(biofx.errors.NonFiniteWeightError):
        _descend(model, optimizer, data.train, epochs, seed)
    return accuracy(model, data.validation), accuracy(model, data.test)


def _descend(model: nn.Module, optimizer: torch.optim.Optimizer, part: Part, epochs: int, seed: int) -> None:
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs)
    shuffle = torch.Generator().manual_seed(seed)
    images, labels = part
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        decay.step()


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Return how many of the images a network reads in eval mode, in percent."""
    model.eval()
    right = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(part[0].split(1000), part[1].split(1000), strict=True)
    )
    return 100 * right / len(part[1])
