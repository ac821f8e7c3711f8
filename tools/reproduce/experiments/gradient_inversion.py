"""Gradient inversion: what the gradients of one image say of it, with each mechanism and without.

A network as it is made shares the gradients of one image. An attacker who is *blind* has its weights and
takes it for a plain network; an *informed* one runs the network that shared them, with its mechanisms and
factors. The label is recovered by the rule of iDLG. The image is searched by matching gradients, by their
squared distance or by their direction, or read off the first layer, in which a unit's row is its bias's
gradient times the image; the informed divide by the factors first.

The perceptron has two hidden layers of 64 sigmoids; the convolutional network is that of DLG: three
convolutions of 12 channels, 5 by 5, strides 2, 2 and 1, sigmoids, weights from U(-0.5, 0.5). Nothing learns
here: gradients are seen as they are, which the table calls a learning rate of 1.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import biofx
from reproduce import inversion
from reproduce.arms import build
from reproduce.experiment import Arm, Case, Claim, Experiment, Figure, Job, Load, Measure, Measured, Published
from reproduce.inversion import Gradients, Matching
from reproduce.networks import Shape, dense

_OFF = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)
_SPLIT_AND_SIGNS = {"weight_splitting_Gamma": 2, "apply_dales_principle": True}
MECHANISMS = {
    "rates 0.09": biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.09),
    "rates 0.5": biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.5),
    "split": _OFF.replace(weight_splitting_Gamma=2),
    "signs": _OFF.replace(apply_dales_principle=True),
    "all": biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.09).replace(**_SPLIT_AND_SIGNS),
}
NARROW = "half the width"
ARMS = {
    "plain": Arm(control=None),
    NARROW: Arm(about="as wide as what split layers deploy, for what their smaller number of gradients does"),
    **{
        f"{name}, {attacker}": Arm(config=config)
        for name, config in MECHANISMS.items()
        for attacker in ("blind", "informed")
    },
}
_READ_OFF = "read off"


def perceptron(shape: Shape, times: int = 2) -> nn.Module:
    """Return the fully connected network, of ``times`` times 32 units."""
    return dense(shape, 32 * times, 32 * times, activation=nn.Sigmoid)


def convolutional(shape: Shape, times: int = 2) -> nn.Module:
    """Return DLG's network, for images of any shape, of ``times`` times 6 channels."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(channels, 6 * times, 5, padding=2, stride=stride), nn.Sigmoid()]
        channels = 6 * times
    pixels = -(-shape[1] // 4) * -(-shape[2] // 4)
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * pixels, 10))
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return network


NETWORKS = {"perceptron": perceptron, "convolutional": convolutional}
ATTACKS = {
    "perceptron": (_READ_OFF, "distance", "direction"),
    "convolutional": ("distance", "direction"),
}


def taken_for(victim: nn.Module, plain: nn.Module) -> nn.Module:
    """Return what the blind take a network for: the plain one, which gets its weights."""
    plain.load_state_dict(biofx.checkpoints.plain_state(victim))
    return plain


def without_factors(victim: nn.Module, shared: Gradients) -> Gradients:
    """Return shared gradients divided by the learning-rate factors of those who know them."""
    factors: dict[str, Tensor] = {}
    for path, module in victim.named_modules():
        if isinstance(module, biofx.BioModule) and module.acting_factors is not None:
            factors[path.removesuffix("bio_mod") + "weight"] = module.acting_factors
    names = [name for name, _ in victim.named_parameters()]
    return tuple(
        gradient / factors[name] if name in factors else gradient
        for name, gradient in zip(names, shared, strict=True)
    )


def attack(job: Job, image: Tensor, label: int, number: int) -> tuple[Tensor, bool]:
    """Return what the job's attacker makes of the gradients of an image, and whether the label is right.

    Args:
        job: says which network, mechanism and attacker.
        image: ``(channels, height, width)``.
        label: its class.
        number: of the image among those of the seed, which decides weights and starts with it.
    """
    network, objective = job.case.split(": ")
    seed = 1000 * job.seed + number
    shape: Any = tuple(image.shape)
    times = 1 if job.arm == NARROW else 2
    victim, _ = build(ARMS[job.arm], lambda: NETWORKS[network](shape, times), seed)
    shared = inversion.gradients(victim, image, label)
    recovered = inversion.recover_label(shared[-2])
    if objective == _READ_OFF:
        known = without_factors(victim, shared) if job.arm.endswith("informed") else shared
        found = inversion.read_input(known[0], known[1]).reshape(shape).clamp(0, 1)
        return found, recovered == label
    model = taken_for(victim, NETWORKS[network](shape)) if job.arm.endswith("blind") else victim
    steps, starts = (("lbfgs", job.length("starts")), ("adam", 1))[objective == "direction"]
    found = inversion.reconstruct(
        lambda guess: inversion.gradients(model, guess, recovered, differentiable=True),
        shared,
        shape,
        Matching(objective, job.length(steps), starts),
        torch.Generator().manual_seed(seed),
    )
    return found, recovered == label


def run(job: Job, load: Load) -> Measured:
    """Attack the gradients of some images, each shared by a network of its own."""
    with torch.random.fork_rng(devices=[]):
        images, labels = load(job.seed).test
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(job.seed))
        found: list[dict[str, float]] = []
        for number, place in enumerate(order[: job.length("images")].tolist()):
            guess, right = attack(job, images[place], int(labels[place]), number)
            found.append({**_figures(guess, images[place]), "label": 100.0 * right})
    return Measured({name: mean(entry[name] for entry in found) for name in found[0]})


def _figures(guess: Tensor, image: Tensor) -> dict[str, float]:
    return {
        "error": inversion.error(guess, image),
        "ratio": inversion.peak_ratio(guess, image),
        "similarity": inversion.similarity(guess, image),
    }


def _left_by(arm: str, case: str) -> Claim:
    def difference(figure: Figure) -> float:
        return figure(case, arm, "error") - figure(case, "plain", "error")

    return Claim(
        f"{case}: error with {arm} minus that without, above 0 where it protects", difference, low=0.01
    )


EXPERIMENT = Experiment(
    name="gradient-inversion",
    about="whether gradients say less of an image with mechanisms than without, and to whom",
    source=(
        "the claim: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025), doi "
        "10.1038/s41467-025-60078-9; the attacks: Zhu et al. 2019, Zhao et al. 2020 (arXiv 2001.02610), "
        "Geiping et al. 2020 (arXiv 2003.14053)"
    ),
    run=run,
    arms=ARMS,
    cases={
        f"{network}: {objective}": Case(1.0)
        for network, objectives in ATTACKS.items()
        for objective in objectives
    },
    measures={
        "error": Measure("squared error of pixels", digits=4, lower_is_better=True),
        "ratio": Measure("peak signal to noise [dB]", digits=1),
        "similarity": Measure("structural similarity"),
        "label": Measure("labels recovered [%]", digits=0),
    },
    validation="error",
    validation_lower_is_better=True,
    lengths={"images": 10, "lbfgs": 300, "adam": 4000, "starts": 5},
    short={"images": 2, "lbfgs": 50, "adam": 300, "starts": 2},
    seeds=5,
    published=(
        Published("with synaptic diversity", "resilience to gradient inversion increases (abstract)"),
        Published("iDLG", "labels are recovered with certainty (cross-entropy, one image)"),
    ),
    claims=tuple(
        _left_by(f"all, {attacker}", f"{network}: {objective}")
        for network, objectives in ATTACKS.items()
        for objective in objectives
        for attacker in ("blind", "informed")
    ),
)
