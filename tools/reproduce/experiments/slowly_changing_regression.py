"""A small network follows a larger one whose inputs change slowly, and is the worse at it the longer it does.

Each input has 20 bits: 15 stay for 10 000 steps, after which one of them, chosen at random, flips; 5 are
drawn at each step. The target is a fixed network of 100 linear threshold units with weights ±1. A unit is 1
where its input, bias included, exceeds β (m + 1) - S, with S = (m - Σ weights + bias) / 2 for m inputs, as
in the authors' code; but for the bias S is the number of weights of -1. The learner has 5 ReLUs and takes a
step on the squared error of each example as it comes. The error before the step is reported.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from biofx.errors import NonFiniteWeightError
from reproduce.experiment import Arm, Case, Claim, Experiment, Job, Load, Measure, Measured, Published
from reproduce.streams import OFF, arms_of, dead_units, initialised, learner_of, part_mean

INPUTS, SLOW, TARGET_UNITS, UNITS = 20, 15, 100, 5
BLOCK = 10_000
"""Steps between two flips."""
BETA = 0.7
_PROBE = 1000

_INITIAL = OFF.replace(initial_distribution="uniform", initial_gain=math.sqrt(2)).override(
    "2", initial_gain=1.0
)
ARMS: dict[str, Arm] = arms_of(_INITIAL)


class Target:
    """The network of threshold units, drawn from a generator."""

    def __init__(self, generator: Generator) -> None:
        def signs(*shape: int) -> Tensor:
            return torch.randint(2, shape, generator=generator).float() * 2 - 1

        self.weight, self.bias = signs(TARGET_UNITS, INPUTS), signs(TARGET_UNITS)
        self.readout, self.offset = signs(TARGET_UNITS), signs(1)
        self.threshold = BETA * (INPUTS + 1) - (INPUTS - self.weight.sum(1) + self.bias) / 2

    def __call__(self, bits: Tensor) -> Tensor:
        """Return the values, ``(n, 1)``, of inputs, ``(n, 20)``."""
        on = (bits @ self.weight.T + self.bias > self.threshold).float()
        return (on @ self.readout + self.offset).unsqueeze(1)


class Stream:
    """Examples without end, in blocks between two flips; the seed decides all of them."""

    def __init__(self, seed: int) -> None:
        self._generator = Generator().manual_seed(seed)
        self.target = Target(self._generator)
        self.slow = self._bits(SLOW)

    def block(self) -> tuple[Tensor, Tensor]:
        """Return the next inputs, ``(10000, 20)``, and values, ``(10000, 1)``; then a slow bit flips."""
        bits = torch.cat([self.slow.expand(BLOCK, SLOW), self._bits(BLOCK, INPUTS - SLOW)], dim=1)
        flipped = int(torch.randint(SLOW, (), generator=self._generator))
        self.slow = self.slow.clone()
        self.slow[flipped] = 1 - self.slow[flipped]
        return bits, self.target(bits)

    def _bits(self, *shape: int) -> Tensor:
        return torch.randint(2, shape, generator=self._generator).float()


def network() -> nn.Module:
    """Return the learner, initialised as the authors do."""
    return initialised(nn.Sequential(nn.Linear(INPUTS, UNITS), nn.ReLU(), nn.Linear(UNITS, 1)))


def run(job: Job, load: Load) -> Measured:
    """Follow the stream; return errors and dead units by blocks."""
    model, optimizer, _ = learner_of(ARMS[job.arm], network, job.seed, job.case, job.rate)
    stream, steps = Stream(job.seed), job.length("steps")
    errors: list[float] = []
    dead: list[float] = []
    at = [min(start + BLOCK, steps) for start in range(0, steps, BLOCK)]
    for end in at:
        inputs, values = (part[: end - len(errors) * BLOCK] for part in stream.block())
        try:
            errors.append(_learn(model, optimizer, inputs, values))
        except NonFiniteWeightError:
            missing = [math.nan] * (len(at) - len(errors))
            errors, dead = errors + missing, dead + missing
            break
        dead.append(dead_units(model, inputs[-_PROBE:]))
    figures = {
        "late": part_mean(errors, 0.8, 1),
        "early": part_mean(errors, 0, 0.2),
        "dead": part_mean(dead, 0.8, 1),
    }
    return Measured(
        {**figures, "error": part_mean(errors, 0, 1)}, {"error": errors, "dead": dead}, [*map(float, at)]
    )


def _learn(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, values: Tensor) -> float:
    """Take a step on each example; return the mean of the errors before the steps."""
    losses = []
    for example, value in zip(inputs.split(1), values.split(1), strict=True):
        optimizer.zero_grad()
        loss = F.mse_loss(model(example), value)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


EXPERIMENT = Experiment(
    name="slowly-changing-regression",
    about="5 ReLUs follow 100 threshold units while one of 15 slow input bits flips every 10 000 steps",
    source="Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton, Nature 632 (2024), "
    "doi 10.1038/s41586-024-07711-7; Dohare, Sutton, Mahmood, arXiv 2108.06325",
    run=run,
    arms=ARMS,
    cases={"SGD": Case(0.01, (0.003, 0.01, 0.03))},
    measures={
        "late": Measure("error, last fifth", lower_is_better=True),
        "early": Measure("error, first fifth", lower_is_better=True),
        "dead": Measure("dead units, last fifth [%]", digits=0, lower_is_better=True),
    },
    validation="error",
    validation_lower_is_better=True,
    curves={"error": "squared error", "dead": "dead units [%]"},
    time="steps",
    lengths={"steps": 600_000},
    short={"steps": 200_000},
    seeds=20,
    needs_images=False,
    published=(
        Published("plain, step 0.01, at the start", "about 0.6"),
        Published("plain, step 0.01, in the end", "1.2 to 1.35"),
    ),
    claims=(
        Claim(
            "plain rises: error of the last fifth minus the first",
            lambda of: of("SGD", "plain", "late") - of("SGD", "plain", "early"),
            low=0.1,
        ),
        Claim("plain ends at 1.2 to 1.35", lambda of: of("SGD", "plain", "late"), 1.2, 1.35),
        Claim("units end at 0.6 or less", lambda of: of("SGD", "units", "late"), high=0.6),
        Claim(
            "weights by utility end at 1.0 or less",
            lambda of: of("SGD", "weights by utility", "late"),
            high=1.0,
        ),
    ),
)
