"""Images whose pixels are permuted anew for each task, seen once: a network becomes worse at learning them.

A task is a permutation of the pixels of all images and an order of the images, both drawn at random; one
pass in batches of 30 learns it. A batch is predicted before it is learned from: the accuracy of a task is
that of these predictions. The network has three hidden layers of 100 ReLUs. Nothing says where a task ends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from biofx.errors import NonFiniteWeightError
from reproduce.data import Part
from reproduce.experiment import (
    Arm,
    Case,
    Claim,
    Experiment,
    Figure,
    Job,
    Load,
    Measure,
    Measured,
    Published,
)
from reproduce.streams import OFF, arms_of, dead_units, initialised, learner_of, part_mean

BATCH, WIDTH = 30, 100
_INITIAL = OFF.replace(initial_distribution="uniform", initial_gain=math.sqrt(2)).override(
    "6", initial_gain=1.0
)
ARMS: dict[str, Arm] = arms_of(_INITIAL, unit_every=10, weights_every=100)


@dataclass(frozen=True)
class Task:
    """A permutation of the pixels, and an order of images; batches are permuted as they come."""

    images: Tensor
    """All of them, as they are, ``(n, pixels)``."""
    labels: Tensor
    order: Tensor
    """Which of them come, int64."""
    permutation: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, ``(size, pixels)``, and labels, in order."""
        for chosen in self.order.split(size):
            yield self.images[chosen][:, self.permutation], self.labels[chosen]

    def last(self, number: int) -> Tensor:
        """Return the last images."""
        return self.images[self.order[-number:]][:, self.permutation]


def tasks(part: Part, seed: int, images: int) -> Iterator[Task]:
    """Yield tasks without end; the seed decides all.

    Args:
        part: images and labels to draw from.
        seed: of permutations and orders.
        images: of a task, a count; all, where there are fewer.
    """
    generator = Generator().manual_seed(seed)
    pixels, labels = part[0].flatten(1), part[1]
    while True:
        order = torch.randperm(len(labels), generator=generator)[:images]
        yield Task(pixels, labels, order, torch.randperm(pixels.shape[1], generator=generator))


def network(pixels: int) -> nn.Module:
    """Return a network for ``(batch, pixels)``."""
    widths = (pixels, WIDTH, WIDTH, WIDTH)
    hidden = [
        layer
        for before, after in itertools.pairwise(widths)
        for layer in (nn.Linear(before, after), nn.ReLU())
    ]
    return initialised(nn.Sequential(*hidden, nn.Linear(WIDTH, 10)))


def run(job: Job, load: Load) -> Measured:
    """Learn task after task; return accuracies and dead units."""
    part = load(job.seed).train
    pixels = part[0][0].numel()
    model, optimizer, _ = learner_of(ARMS[job.arm], lambda: network(pixels), job.seed, job.case, job.rate)
    number = job.length("tasks")
    accuracies: list[float] = []
    dead: list[float] = []
    for task in tasks(part, job.seed, job.length("images")):
        try:
            accuracies.append(learn(model, optimizer, task))
        except NonFiniteWeightError:
            missing = [math.nan] * (number - len(accuracies))
            accuracies, dead = accuracies + missing, dead + missing
        else:
            dead.append(dead_units(model, task.last(1000)))
        if len(accuracies) == number:
            break
    tenths = [part_mean(accuracies, tenth / 10, (tenth + 1) / 10) for tenth in range(10)]
    return Measured(
        {
            "late": tenths[-1],
            "best": max(tenths),
            "accuracy": part_mean(accuracies, 0, 1),
            "dead": part_mean(dead, 0.9, 1),
        },
        {"accuracy": accuracies, "dead": dead},
        [float(task + 1) for task in range(number)],
    )


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task) -> float:
    """Take a step on each batch; return how many were right before the steps, in percent."""
    right = []
    for batch, expected in task.batches(BATCH):
        optimizer.zero_grad()
        logits = model(batch)
        F.cross_entropy(logits, expected).backward()
        optimizer.step()
        right.append((logits.detach().argmax(1) == expected).sum())
    return 100 * int(torch.stack(right).sum()) / len(task.order)


def _prevented(of: Figure, case: str, arm: str) -> float:
    """Return how much of what plain loses from its best tenth to its last the arm does not lose."""
    end = of(case, "plain", "late")
    loss = of(case, "plain", "best") - end
    return (of(case, arm, "late") - end) / loss if loss > 0 else math.nan


def _claims(case: str) -> tuple[Claim, ...]:
    return (
        Claim(
            f"{case}: plain falls by a point or more, from its best tenth to its last",
            lambda of: of(case, "plain", "best") - of(case, "plain", "late"),
            low=1,
        ),
        *(
            Claim(
                f"{case}: {arm} prevents half of that or more",
                lambda of, arm=arm: _prevented(of, case, arm),  # type: ignore[misc]
                low=0.5,
            )
            for arm in ("units", "weights by utility")
        ),
    )


EXPERIMENT = Experiment(
    name="online-permuted-images",
    about="a new permutation of the pixels for each task, one pass over each",
    source="Dohare and others, Nature 632 (2024), doi 10.1038/s41586-024-07711-7; Hernandez-Garcia, Dohare, "
    "Luo, Sutton, arXiv 2508.00212",
    run=run,
    arms=ARMS,
    cases={"SGD": Case(0.05, (0.02, 0.05, 0.1)), "Adam": Case(0.001, (0.0003, 0.001, 0.003))},
    measures={
        "late": Measure("online accuracy, last tenth [%]"),
        "best": Measure("best tenth [%]"),
        "dead": Measure("dead units, last tenth [%]", digits=1),
    },
    validation="accuracy",
    curves={"accuracy": "online accuracy [%]", "dead": "dead units [%]"},
    time="task",
    lengths={"tasks": 150, "images": 54_000},
    short={"tasks": 40, "images": 9_000},
    seeds=5,
    published=(
        Published("plain SGD 0.05, MNIST, width 100: best", "93.3 %"),
        Published("the same by task 150", "about 88 %"),
    ),
    claims=(*_claims("SGD"), *_claims("Adam")),
)
