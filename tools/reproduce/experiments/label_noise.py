"""Few images, some with wrong labels: does drawing weights again help, and more than weight decay does?

A share of the labels of training and of validation images is replaced by another class, drawn uniformly; test
labels are right. Networks of two hidden layers of 128 ReLUs learn by SGD with momentum 0.9 in batches of 50.
What is drawn again is so between stages of a few epochs, never after the last. Beside the accuracy at the end
stands that of the epoch that was best on validation images, which is early stopping, and how many of the
wrong labels the network has learned by heart.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Generator, Tensor

import biofx
from reproduce.arms import build
from reproduce.data import Data, Part
from reproduce.experiment import Arm, Case, Experiment, Job, Load, Measure, Measured, Published
from reproduce.networks import dense
from reproduce.training import accuracy, each_epoch, learn

BATCH, MOMENTUM, WIDTHS = 50, 0.9, (128, 128)
CLASSES = 10
SHARES = {"0 % wrong": 0.0, "20 % wrong": 0.2, "40 % wrong": 0.4}
_OFF = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)
_WEIGHTS, _UNITS = (biofx.Rule("rejuvenate_weights"),), (biofx.Rule("rejuvenate_units"),)
_SHRINK = (biofx.Rule("shrink_and_perturb"),)


def _strengths() -> dict[str, Arm]:
    arms = {f"weight decay {decay:g}": Arm(weight_decay=decay) for decay in (1e-4, 1e-3, 1e-2)}
    for share in (0.1, 0.4):
        by_magnitude = _OFF.replace(rejuvenation_turnover=share)
        by_utility = by_magnitude.replace(rejuvenation_utility="gradient", rejuvenation_redraw="initial")
        units = _OFF.replace(
            unit_turnover="continual-backprop", unit_turnover_rate=share, unit_turnover_maturity=1
        )
        arms[f"weights by magnitude {share:g}"] = Arm(config=by_magnitude, rules=_WEIGHTS)
        arms[f"weights by utility {share:g}"] = Arm(config=by_utility, rules=_WEIGHTS)
        arms[f"units {share:g}"] = Arm(config=units, rules=_UNITS)
    for shrink in (0.8, 0.4):
        config = _OFF.replace(shrink_factor=shrink, shrink_perturbation=0.1)
        arms[f"shrink and perturb {shrink:g}"] = Arm(config=config, rules=_SHRINK)
    return arms


ARMS = {"plain": Arm(control=None), **_strengths()}


def with_wrong_labels(part: Part, share: float, generator: Generator) -> tuple[Part, Tensor]:
    """Return the part with the share of its labels replaced by another class, and which these are.

    Args:
        part: images and labels.
        share: of the labels, dimensionless, rounded to whole images.
        generator: of which labels are wrong, and of what they become.
    """
    images, labels = part
    count = round(share * len(labels))
    wrong = torch.randperm(len(labels), generator=generator)[:count]
    shifts = torch.randint(1, CLASSES, (count,), generator=generator)
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + shifts) % CLASSES
    return (images, labels), wrong


def noisy(data: Data, share: float, seed: int) -> tuple[Data, Part]:
    """Return data with wrong labels in training and validation, and the training images that have them."""
    generator = Generator().manual_seed(seed)
    train, wrong = with_wrong_labels(data.train, share, generator)
    validation, _ = with_wrong_labels(data.validation, share, generator)
    return dataclasses.replace(data, train=train, validation=validation), (train[0][wrong], train[1][wrong])


def run(job: Job, load: Load) -> Measured:
    """Train the job's network; measure it after each epoch."""
    arm = ARMS[job.arm]
    right = load(job.seed).limited(job.length("images"), job.length("held-out"))
    data, wrong = noisy(right, SHARES[job.case], job.seed)
    model, observers = build(arm, lambda: dense(data.shape, *WIDTHS), job.seed)
    validation, test = learn(
        model,
        data,
        torch.optim.SGD(model.parameters(), lr=job.rate, momentum=MOMENTUM, weight_decay=arm.weight_decay),
        epochs=job.length("epochs"),
        batch=BATCH,
        seed=job.seed,
        rules=[each_epoch(rule.name, data, BATCH, epochs=job.length("stage")) for rule in arm.rules],
        observers=observers,
    )
    best = max(range(len(validation)), key=lambda epoch: validation[epoch])
    figures = {
        "test": test[-1],
        "stopped": test[best],
        "by heart": accuracy(model, wrong) if len(wrong[1]) else 0.0,
        "validation": validation[-1],
    }
    return Measured(figures, {"test": test}, [float(epoch + 1) for epoch in range(len(test))])


EXPERIMENT = Experiment(
    name="label-noise",
    about="few images with wrong labels: re-initialisation beside weight decay and early stopping",
    source=(
        'Zaidi, Berariu, Kim, Bornschein, Clopath, Teh, Pascanu, "When does re-initialization work?", PMLR '
        "187 (2023), arXiv 2206.10011; shrink and perturb: Ash and Adams, NeurIPS 2020; the protocol is ours"
    ),
    run=run,
    arms=ARMS,
    cases={name: Case(None, (0.01, 0.05)) for name in SHARES},
    measures={
        "test": Measure("test accuracy at the end [%]"),
        "stopped": Measure("stopped early [%]"),
        "by heart": Measure("wrong labels by heart [%]", lower_is_better=True),
        "validation": Measure("validation, wrong labels included [%]"),
    },
    validation="validation",
    curves={"test": "test accuracy [%]"},
    time="epochs",
    lengths={"epochs": 60, "stage": 10, "images": 5000, "held-out": 10_000},
    short={"epochs": 30, "stage": 5, "images": 2000, "held-out": 3000},
    seeds=5,
    published=(
        Published("re-initialisation, right labels", "little to no benefit beside tuned regularisation"),
        Published("re-initialisation, wrong labels", "better, even beside tuned regularisation"),
    ),
)
