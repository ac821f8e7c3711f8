"""Ten permutations of the pixels are learned one after the other, and all are to be known in the end.

Each task is learned for some epochs in batches of 256, by a network of two hidden layers, with Adam, which
forgets its moments between tasks; where a task ends is known. In the end the test images of each task are
read, and the mean over the tasks is reported.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.errors import NonFiniteWeightError
from biofx.plasticity.attachment import Attachment
from reproduce.data import Data, Part
from reproduce.experiment import Arm, Case, Claim, Experiment, Job, Load, Measure, Measured, Published
from reproduce.streams import OFF, initialised, learner_of
from reproduce.training import accuracy

BATCH = 256
_SAMPLES = 300
"""Images of a task on which importance is found, where it is found on data."""


def _consolidating(method: str, rule: str, strength: float, about: str) -> Arm:
    config = OFF.replace(consolidation=method, consolidation_strength=strength)
    return Arm(config=config, rules=(biofx.Rule(rule),), about=about)


ARMS = {
    "plain": Arm(control=None),
    "synaptic intelligence, 0.1": _consolidating(
        "synaptic-intelligence", "synaptic_intelligence", 0.1, "Zenke et al. 2017, their c"
    ),
    "synaptic intelligence, 10": _consolidating(
        "synaptic-intelligence", "synaptic_intelligence", 10.0, "the same, c for short runs of small networks"
    ),
    "elastic consolidation, 100": _consolidating(
        "elastic", "elastic_consolidation", 100.0, "online EWC, Schwarz et al. 2018, λ"
    ),
    "memory-aware synapses, 0.1": _consolidating(
        "memory-aware", "memory_aware", 0.1, "Aljundi et al. 2018, λ"
    ),
}
_ON_DATA = ("elastic", "memory-aware")


def network(pixels: int, units: int) -> nn.Module:
    """Return a network for ``(batch, pixels)``."""
    layers = [nn.Linear(pixels, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 10)]
    return initialised(nn.Sequential(*layers))


def permutations(seed: int, tasks: int, pixels: int) -> list[Tensor]:
    """Return the order of the pixels in each task, int64, ``(pixels,)``."""
    generator = Generator().manual_seed(seed)
    return [torch.randperm(pixels, generator=generator) for _ in range(tasks)]


def run(job: Job, load: Load) -> Measured:
    """Learn the tasks in turn; return how well all are known in the end, and on the way."""
    data, arm = load(job.seed), ARMS[job.arm]
    pixels = data.train[0][0].numel()
    orders = permutations(job.seed, job.length("tasks"), pixels)
    model, optimizer, attachment = learner_of(
        arm, lambda: network(pixels, job.length("units")), job.seed, job.case, job.rate
    )
    images, labels = data.train[0].flatten(1)[: job.length("images")], data.train[1][: job.length("images")]
    shuffle = Generator().manual_seed(job.seed)
    known: list[float] = []
    before: Tensor | None = None
    for number, order in enumerate(orders):
        try:
            begin(arm, attachment, before)
            optimizer.state.clear()
            for _ in range(job.length("epochs")):
                for batch in torch.randperm(len(labels), generator=shuffle).split(BATCH):
                    _step(model.train(), optimizer, images[batch][:, order], labels[batch])
        except NonFiniteWeightError:
            break
        before = images[:_SAMPLES][:, order]
        known.append(_mean_accuracy(model, data.test, orders[: number + 1]))
    known += [math.nan] * (len(orders) - len(known))
    return Measured(
        _figures(model, data, orders), {"known": known}, [float(n + 1) for n in range(len(orders))]
    )


def begin(arm: Arm, attachment: Attachment | None, before: Tensor | None) -> None:
    """Say that a task begins, with images of the last one where importance is found on them."""
    if attachment is None or arm.config is None:
        return
    if arm.config.consolidation in _ON_DATA and before is not None:
        attachment.begin_task([before])
    else:
        attachment.begin_task()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


class Permuted(nn.Module):
    """A network behind the permutation of a task; reads images as they are."""

    def __init__(self, model: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.model, self.order = model, order

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of ``(batch, *shape)``."""
        logits: Tensor = self.model(images.flatten(1)[:, self.order])
        return logits


def _accuracies(model: nn.Module, part: Part, orders: list[Tensor]) -> list[float]:
    return [accuracy(Permuted(model, order), part) for order in orders]


def _mean_accuracy(model: nn.Module, part: Part, orders: list[Tensor]) -> float:
    found = _accuracies(model, part, orders)
    return sum(found) / len(found)


def _figures(model: nn.Module, data: Data, orders: list[Tensor]) -> dict[str, float]:
    each = _accuracies(model, data.test, orders)
    return {
        "mean": sum(each) / len(each),
        "first": each[0],
        "last": each[-1],
        "validation": _mean_accuracy(model, data.validation, orders),
    }


EXPERIMENT = Experiment(
    name="permuted-tasks-consolidation",
    about="ten permutations of the pixels, one after the other, all to be known in the end",
    source="Zenke, Poole, Ganguli, ICML 2017, arXiv 1703.04200; Schwarz and others, ICML 2018, "
    "arXiv 1805.06370; Aljundi and others, ECCV 2018, arXiv 1711.09601",
    run=run,
    arms=ARMS,
    cases={"Adam": Case(0.001, (0.0003, 0.001))},
    measures={
        "mean": Measure("accuracy, mean over the tasks [%]"),
        "first": Measure("first task [%]"),
        "last": Measure("last task [%]"),
    },
    validation="validation",
    curves={"known": "mean accuracy of the tasks so far [%]"},
    time="tasks",
    lengths={"tasks": 10, "images": 54_000, "epochs": 20, "units": 2000},
    short={"tasks": 10, "images": 4_000, "epochs": 4, "units": 100},
    seeds=5,
    published=(
        Published("EWC, MNIST, 10 tasks, mean accuracy", "83 to 94 %"),
        Published("SI, MNIST, 10 tasks, mean accuracy", "83 to 95 %"),
    ),
    claims=tuple(
        claim
        for strength in ("0.1", "10")
        for claim in (
            Claim(
                f"synaptic intelligence, {strength}: mean accuracy of 90 % or more",
                lambda of, arm=f"synaptic intelligence, {strength}": of("Adam", arm, "mean"),  # type: ignore[misc]
                low=90,
            ),
            Claim(
                f"synaptic intelligence, {strength}, minus plain: more than 0",
                lambda of, arm=f"synaptic intelligence, {strength}": (  # type: ignore[misc]
                    of("Adam", arm, "mean") - of("Adam", "plain", "mean")
                ),
                low=0,
            ),
        )
    ),
)
