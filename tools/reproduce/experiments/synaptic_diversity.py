"""Synaptic diversity: split weights, turnover and scattered learning rates, with and without each other.

Splitting halves the width of what is deployed, and the two synapses of a connection take a step each. The
arms that are matched have twice the width, so that what is deployed has that of the plain network, and share
its steps (``weight_splitting_rates="mean"``). The source's fully connected network is not known to us in
detail: ours has two hidden layers of 128 ReLUs, and its weights turn over once an epoch.
"""

from __future__ import annotations

import itertools

import torch

import biofx
from reproduce.arms import build
from reproduce.experiment import Arm, Case, Claim, Experiment, Figure, Job, Load, Measure, Measured, Published
from reproduce.networks import dense
from reproduce.training import each_epoch, learn

BATCH, WIDTH = 100, 128
NU, TURNOVER_DISTANCE, SYNAPSES = 0.09, 14.0, 2
MATCHED = "matched"
_OFF = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)
_RATES = biofx.BioConfig(fuzzy_learning_rate_factor_nu=NU)
_RULE = biofx.Rule("rejuvenate_weights")


def _arm(split: str, rates: bool, turnover: bool) -> Arm:
    config = _RATES if rates else _OFF
    if turnover:
        config = config.replace(rejuvenation_parameter_dre=TURNOVER_DISTANCE)
    if split:
        steps = "mean" if MATCHED in split else "sum"
        config = config.replace(weight_splitting_Gamma=SYNAPSES, weight_splitting_rates=steps)
    return Arm(config=config, rules=(_RULE,) * turnover)  # each run says how many steps an epoch has


def _arms() -> dict[str, Arm]:
    arms = {"plain": Arm(control=None)}
    for split, rates, turnover in itertools.product(
        ("", "split", f"split {MATCHED}"), (False, True), (False, True)
    ):
        name = ", ".join(filter(None, [split, "rates" * rates, "turnover" * turnover]))
        if name:
            arms[name] = _arm(split, rates, turnover)
    return arms


ARMS = _arms()


def run(job: Job, load: Load) -> Measured:
    """Train the job's network; measure it after each epoch."""
    data, arm = load(job.seed).limited(job.length("images")), ARMS[job.arm]
    width = WIDTH * SYNAPSES if MATCHED in job.arm else WIDTH
    model, observers = build(arm, lambda: dense(data.shape, width, width), job.seed)
    validation, test = learn(
        model,
        data,
        torch.optim.SGD(model.parameters(), lr=job.rate),
        epochs=job.length("epochs"),
        batch=BATCH,
        seed=job.seed,
        rules=[each_epoch(rule.name, data, BATCH) for rule in arm.rules],
        observers=observers,
    )
    figures = {
        "test": test[-1],
        "first": test[0],
        "all": sum(test) / len(test),
        "validation": validation[-1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return Measured(figures, {"test": test}, [float(epoch + 1) for epoch in range(len(test))])


def _gain(arm: str, measure: str) -> Claim:
    def difference(figure: Figure) -> float:
        return figure("images", arm, measure) - figure("images", "plain", measure)

    what = {"all": "learns faster (mean accuracy over the epochs)", "test": "ends more accurate"}[measure]
    return Claim(f"{arm}: {what} than plain at 0.001 [%]", difference, low=0)


EXPERIMENT = Experiment(
    name="synaptic-diversity",
    about="the paper itself: split weights x turnover x learning rates, width and step matched and not",
    source=(
        "Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025), doi 10.1038/s41467-025-60078-9; "
        "SGD 0.001, batches of 100, ν 0.09, turnover distance 14"
    ),
    run=run,
    arms=ARMS,
    cases={"images": Case(1e-3, (1e-3, 1e-2, 1e-1, 0.3))},
    measures={
        "test": Measure("test accuracy at the end [%]"),
        "first": Measure("after one epoch [%]"),
        "all": Measure("mean over epochs [%]"),
        "parameters": Measure("parameters", digits=0),
    },
    validation="validation",
    curves={"test": "test accuracy [%]"},
    time="epochs",
    lengths={"epochs": 30, "images": 55_000},
    short={"epochs": 5, "images": 20_000},
    seeds=5,
    published=(
        Published("learning speed", "increased (abstract)"),
        Published("prediction accuracy", "increased (abstract)"),
    ),
    claims=tuple(
        _gain(arm, measure)
        for arm in ("split, rates, turnover", f"split {MATCHED}, rates, turnover")
        for measure in ("all", "test")
    ),
)
