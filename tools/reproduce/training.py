"""Training: epochs of batches whose order a seed decides.

:func:`train` is the protocol of the ablations, with momentum and a learning rate that falls linearly to 0;
:func:`learn` keeps the rate, measures after each epoch, and leaves the rest to the experiment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

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
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs)
    with contextlib.suppress(biofx.errors.NonFiniteWeightError):
        for _ in _epochs(model, optimizer, data.train, epochs, BATCH, seed):
            decay.step()
    return accuracy(model, data.validation), accuracy(model, data.test)


def learn(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch: int,
    seed: int,
    rules: Sequence[biofx.Rule] = (),
    observers: Sequence[Observer] = (),
) -> tuple[list[float], list[float]]:
    """Train a network; return its accuracy on validation and on test images after each epoch, in percent.

    After a rule has found weights that are no longer finite nothing is learned, and accuracies stay.
    """
    if rules or observers:
        biofx.attach(model, optimizer, rules, observers=observers)
    validation: list[float] = []
    test: list[float] = []
    with contextlib.suppress(biofx.errors.NonFiniteWeightError):
        for _ in _epochs(model, optimizer, data.train, epochs, batch, seed):
            validation.append(accuracy(model, data.validation))
            test.append(accuracy(model, data.test))
    missing = epochs - len(test)
    if missing:
        validation += [accuracy(model, data.validation)] * missing
        test += [accuracy(model, data.test)] * missing
    return validation, test


def each_epoch(rule: str, data: Data, batch: int, *, epochs: int = 1) -> biofx.Rule:
    """Return the schedule of a rule that runs between epochs, at the first step of all but the first.

    Args:
        rule: its name.
        data: what is learned.
        batch: images of a batch, a count.
        epochs: from one run to the next, a count.
    """
    steps = epochs * -(-len(data.train[1]) // batch)
    return biofx.Rule(rule, every=steps, after=steps)


def _epochs(
    model: nn.Module, optimizer: torch.optim.Optimizer, part: Part, epochs: int, size: int, seed: int
) -> Iterator[None]:
    shuffle = torch.Generator().manual_seed(seed)
    images, labels = part
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(labels), generator=shuffle).split(size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        yield


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Return how many of the images a network reads in eval mode, in percent."""
    model.eval()
    right = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(part[0].split(1000), part[1].split(1000), strict=True)
    )
    return 100 * right / len(part[1])
