"""Learning that goes on: what experiments on streams of data have in common."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import biofx
from biofx.plasticity.attachment import Attachment
from reproduce.arms import build
from reproduce.experiment import Arm

OFF = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}


def arms_of(initial: biofx.BioConfig, *, unit_every: int = 1, weights_every: int = 1000) -> dict[str, Arm]:
    """Return the arms of experiments on plasticity.

    Args:
        initial: in which mechanisms are off, and which says what weights were drawn from.
        unit_every: steps between two runs of ``rejuvenate_units``, a count; 1e-4 of the mature units are
            replaced at a step, on average.
        weights_every: steps between two rejuvenations of 1 % of the weights, a count.
    """
    weights = (biofx.Rule("rejuvenate_weights", every=weights_every),)
    turnover = initial.replace(rejuvenation_turnover=0.01)
    return {
        "plain": Arm(control=None),
        "units": Arm(
            config=initial.replace(
                unit_turnover="continual-backprop",
                unit_turnover_rate=1e-4 * unit_every,
                unit_turnover_maturity=100 // unit_every,
            ),
            rules=(biofx.Rule("rejuvenate_units", every=unit_every),),
            about="continual backprop: of the units older than 100 steps, 1e-4 a step, by contribution",
        ),
        "weights by utility": Arm(
            config=turnover.replace(
                rejuvenation_utility="gradient",
                rejuvenation_redraw="initial",
                rejuvenation_selection="proportion",
            ),
            rules=weights,
            about=f"every {weights_every} steps the 1 % of lowest |weight · gradient|, as at the start",
        ),
        "weights by magnitude": Arm(
            config=turnover,
            rules=weights,
            about=f"every {weights_every} steps 1 % of the weights by magnitude, as large as the others",
        ),
        "shrink and perturb": Arm(
            config=initial.replace(shrink_factor=0.99, shrink_perturbation=0.05),
            rules=(biofx.Rule("shrink_and_perturb", every=100),),
            about="every 100 steps weights shrink to 0.99, and 0.05 of a draw of the initial ones is added",
        ),
        "pull to the initial weights": Arm(
            config=initial.replace(l2_to_initial_strength=1e-3),
            rules=(biofx.Rule("l2_to_initial"),),
            about="regenerative regularisation, λ = 0.001",
        ),
    }


def initialised(model: nn.Sequential) -> nn.Sequential:
    """Draw weights of linear layers uniformly with He's gain, at the last layer with gain 1; biases are 0."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in layers:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear" if layer is layers[-1] else "relu")
        nn.init.zeros_(layer.bias)
    return model


def learner_of(
    arm: Arm, make: Callable[[], nn.Module], seed: int, optimizer: str, rate: float
) -> tuple[nn.Module, Optimizer, Attachment | None]:
    """Return an arm's network in training mode, its optimizer, and what is attached."""
    model, observers = build(arm, make, seed)
    stepping = OPTIMIZERS[optimizer](model.parameters(), lr=rate, weight_decay=arm.weight_decay)
    attachment = None
    if arm.rules or observers:
        attachment = biofx.attach(model, stepping, arm.rules, observers=observers)
    return model.train(), stepping, attachment


@torch.no_grad()
def dead_units(model: nn.Module, inputs: Tensor) -> float:
    """Return the share of the ReLUs that are 0 for all inputs, in percent."""
    dead: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: dead.append((output == 0).all(0).float()))
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    was_training = model.training
    # watched inputs of units count in training alone
    model.eval()(inputs)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return 100 * float(torch.cat(dead).mean())


def part_mean(values: Sequence[float], start: float, end: float) -> float:
    """Return the mean of the values between two fractions of their number; at least of one value."""
    first = min(len(values) - 1, round(start * len(values)))
    return statistics.mean(values[first : max(first + 1, round(end * len(values)))])
