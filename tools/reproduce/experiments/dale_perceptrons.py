"""Dale's principle in perceptrons of three hidden layers of 500 ReLUs, batches of 32, plain gradient descent.

The source compares a plain perceptron, one whose columns have a sign each (ColEI), and its own networks with
inhibition inside each layer (DANN), each at a learning rate chosen for it. ``project`` and ``abs`` are of
ColEI's kind, with initial weights of their own; ``expand`` begins with the plain network's function. There is
no DANN here. The source's code takes rates of 0.298 for the plain perceptron, 0.053 for ColEI and 0.111 for
DANN on MNIST, and 50 epochs.
"""

from __future__ import annotations

import torch

import biofx
from reproduce.arms import build
from reproduce.experiment import Arm, Case, Experiment, Job, Load, Measure, Measured, Published
from reproduce.networks import dense
from reproduce.training import learn

BATCH, WIDTHS = 32, (500, 500, 500)
_DALE = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE, apply_dales_principle=True)

ARMS = {
    "plain": Arm(control=None),
    "sign-free": Arm(config=_DALE, freed=True, about="begins with the weights of project, without signs"),
    "project": Arm(config=_DALE),
    "abs": Arm(config=_DALE.replace(dales_method="abs")),
    "expand": Arm(config=_DALE.replace(dales_method="expand"), about="in common: the function at the start"),
}


def run(job: Job, load: Load) -> Measured:
    """Train the job's network; measure it after each epoch."""
    data, arm = load(job.seed).limited(job.length("images")), ARMS[job.arm]
    model, observers = build(arm, lambda: dense(data.shape, *WIDTHS), job.seed)
    validation, test = learn(
        model,
        data,
        torch.optim.SGD(model.parameters(), lr=job.rate),
        epochs=job.length("epochs"),
        batch=BATCH,
        seed=job.seed,
        observers=observers,
    )
    figures = {
        "test": test[-1],
        "first": test[0],
        "validation": validation[-1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return Measured(figures, {"test": test}, [float(epoch + 1) for epoch in range(len(test))])


EXPERIMENT = Experiment(
    name="dale-perceptrons",
    about="what Dale's principle costs three hidden layers of 500 units, by method",
    source=(
        "Cornford, Kalajdzievski, Leite, Lamarquette, Kullmann, Richards, \"Learning to live with Dale's "
        'principle", ICLR 2021'
    ),
    run=run,
    arms=ARMS,
    cases={"images": Case(None, (0.03, 0.1, 0.3))},
    measures={
        "test": Measure("test accuracy at the end [%]"),
        "first": Measure("after one epoch [%]"),
        "parameters": Measure("parameters", digits=0),
    },
    validation="validation",
    curves={"test": "test accuracy [%]"},
    time="epochs",
    lengths={"epochs": 50, "images": 55_000},
    short={"epochs": 5, "images": 10_000},
    seeds=5,
    published=(
        Published("DANN", "as accurate as a plain perceptron, with its initialisation and corrected updates"),
        Published("ColEI", "less accurate than a plain perceptron"),
    ),
)
