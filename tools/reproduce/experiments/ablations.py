"""Each mechanism and its control on two small networks, on images that come in random order."""

from __future__ import annotations

import biofx
from reproduce.arms import build
from reproduce.experiment import Arm, Case, Experiment, Job, Load, Measure, Measured
from reproduce.networks import NETWORKS
from reproduce.training import GRID, train

_OFF = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)
_RATES = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.5)
_DALE = _OFF.replace(apply_dales_principle=True)
_CRYSTALLIZE = (biofx.Rule("crystallize", every=5),)

ARMS = {
    "plain": Arm(control=None),
    "mean rates": Arm(config=_RATES, levelled=True, control=None),
    "fuzzy rates": Arm(config=_RATES, control="mean rates", about="in common: each layer's mean rate"),
    "crystallizing mean": Arm(config=_OFF, rules=_CRYSTALLIZE, levelled=True, control=None),
    "crystallizing": Arm(
        config=_OFF,
        rules=_CRYSTALLIZE,
        control="crystallizing mean",
        about="in common: the rule by which each layer's mean rate falls",
    ),
    "volume": Arm(
        config=_OFF.replace(base_lr=None),
        rules=(biofx.Rule("volume_dependent_lr"),),
        about="in common: each layer's mean rate, 1 at every step",
    ),
    "turnover": Arm(
        config=_OFF.replace(rejuvenation_turnover=0.01),
        rules=(biofx.Rule("rejuvenate_weights", every=20),),
        about="in common: initial weights and rates; nothing is replaced in the control",
    ),
    "split in 2": Arm(
        config=_OFF.replace(weight_splitting_Gamma=2),
        about="in common: number of parameters, initial weights",
    ),
    "sign-free": Arm(config=_DALE, freed=True, control=None),
    "Dale": Arm(
        config=_DALE,
        control="sign-free",
        about="in common: initial weights, which are sparse, signed, balanced",
    ),
}


def run(job: Job, load: Load) -> Measured:
    """Train the job's network; return its accuracy on validation and on test images."""
    data, arm, network = load(job.seed), ARMS[job.arm], NETWORKS[job.case]
    model, observers = build(arm, lambda: network.make(data.shape), job.seed)
    validation, test = train(
        model,
        data,
        rate=job.rate,
        epochs=job.length(f"{job.case}-epochs"),
        seed=job.seed,
        rules=arm.rules,
        observers=observers,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measured({"test": test, "validation": validation, "parameters": parameters})


EXPERIMENT = Experiment(
    name="ablations",
    about="each mechanism and its control, equal in all but the mechanism, on two networks",
    source="none: the controls are ours",
    run=run,
    arms=ARMS,
    cases={name: Case(None, GRID) for name in NETWORKS},
    measures={"test": Measure("test accuracy [%]"), "parameters": Measure("parameters", digits=0)},
    validation="validation",
    lengths={f"{name}-epochs": network.epochs for name, network in NETWORKS.items()},
    short={f"{name}-epochs": 3 for name in NETWORKS},
    seeds=8,
)
