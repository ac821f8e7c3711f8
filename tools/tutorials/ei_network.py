"""Excitatory and inhibitory units that decide: ``python tools/tutorials/ei_network.py``.

Which of two noisy stimuli is stronger on average? Monkeys answer such questions, and networks of
computational neuroscience are trained on them. Here the task comes from neurogym, and two networks of 80
excitatory and 20 inhibitory units learn it: one is written by hand as a loop over time, with leak and noise,
the other is an ``nn.RNN``. From the first step each unit has one sign at all of its synapses, and none
connects to itself. How often each network chooses right, and the eigenvalues of its recurrent weights, end up
in one picture. It takes a few minutes; nothing is downloaded. It needs
``pip install -e ".[neuro]" -c tools/constraints.txt``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx

UNITS, EXCITATORY = 100, 80
SIGNS = [1] * EXCITATORY + [-1] * (UNITS - EXCITATORY)
STEP, TIME_CONSTANT = 50, 100
"""Of the simulation and of the units, in milliseconds."""
COHERENCES = (0.0, 6.4, 12.8, 25.6, 51.2)
"""Those of the task: how much stronger one stimulus is, in percent."""
FINER = (1.6, 3.2)
"""Others, to see the curve between them."""
LEFT, RIGHT = 0, 1


class RateNetwork(nn.Module):
    """Rates of units with leak and noise (Song, Yang, Wang, PLOS Computational Biology 2016, equation 1)."""

    def __init__(self, inputs: int, outputs: int, noise: float = 0.1) -> None:
        super().__init__()
        self.w_in, self.w_rec = nn.Linear(inputs, UNITS, bias=False), nn.Linear(UNITS, UNITS)
        self.w_out = nn.Linear(UNITS, outputs)
        self.alpha, self.noise = STEP / TIME_CONSTANT, noise

    def forward(self, x: Tensor) -> Tensor:
        """Return an activity for each action at each step; ``x`` has shape ``(time, trials, inputs)``."""
        state = x.new_zeros(x.shape[1], UNITS)
        rate, outputs = torch.relu(state), []
        for observation in x:
            drive = self.w_rec(rate) + self.w_in(observation)
            drive = drive + self.noise * (2 / self.alpha) ** 0.5 * torch.randn_like(state)
            state = (1 - self.alpha) * state + self.alpha * drive
            rate = torch.relu(state)
            outputs.append(self.w_out(rate))
        return torch.stack(outputs)


class PlainNetwork(nn.Module):
    """The same with the recurrent layer of torch, which has neither leak nor noise."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(inputs, UNITS, nonlinearity="relu")
        self.w_out = nn.Linear(UNITS, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return an activity for each action at each step."""
        logits: Tensor = self.w_out(self.rnn(x)[0])
        return logits


# the task


@dataclass(frozen=True)
class Trials:
    """Some trials of the task."""

    observations: Tensor
    """Of shape ``(time, trials, 3)``: fixation, and two stimuli."""
    targets: Tensor
    """The right action at each step, of shape ``(time, trials)``: 0 is to fixate, 1 and 2 are choices."""
    coherences: Tensor
    """Positive where the stimulus on the right is the stronger one, in percent."""


class Task:
    """Perceptual decision making, as neurogym has it (after Britten, Shadlen, Newsome, Movshon 1992)."""

    def __init__(self) -> None:
        import neurogym

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the environment does not say how to draw it
            made: Any = neurogym.make("PerceptualDecisionMaking-v0", dt=STEP).unwrapped
        self._environment = made
        self.inputs, self.actions = made.observation_space.shape[0], int(made.action_space.n)

    def trials(self, count: int, seed: int) -> Trials:
        """Return trials of random coherence and side."""
        self._environment.seed(seed)
        return self._gathered(self._environment.new_trial() for _ in range(count))

    def test_trials(self, count: int, seed: int) -> Trials:
        """Return as many trials of each coherence and side."""
        self._environment.seed(seed)
        return self._gathered(
            self._environment.new_trial(coh=coherence, ground_truth=side)
            for coherence in (*COHERENCES, *FINER)
            for side in (LEFT, RIGHT)
            for _ in range(count)
        )

    def _gathered(self, trials: Iterable[Any]) -> Trials:
        observations, targets, coherences = [], [], []
        for trial in trials:  # each is made when it is asked for
            observations.append(self._environment.ob)
            targets.append(self._environment.gt)
            coherences.append(trial["coh"] if trial["ground_truth"] == RIGHT else -trial["coh"])
        return Trials(
            torch.tensor(numpy.stack(observations, 1), dtype=torch.float32),
            torch.tensor(numpy.stack(targets, 1)),
            torch.tensor(numpy.array(coherences, dtype=numpy.float32)),
        )


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, steps: int) -> None:
    """Train: a loop as you have it, with not a word of signs or masks in it."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(steps):
        trials = task.trials(32, seed=1 + step)
        logits, targets = model(trials.observations).flatten(0, 1), trials.targets.flatten()
        errors, decides = F.cross_entropy(logits, targets, reduction="none"), targets > 0
        loss = errors[decides].mean() + errors[~decides].mean()  # decisions are short
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def choices(model: nn.Module, trials: Trials) -> Tensor:
    """Return what a network does at the end of each trial: 0 to fixate still, 1 for left, 2 for right."""
    model.eval()
    return model(trials.observations)[-1].argmax(-1)  # type: ignore[no-any-return]


def mean_and_error(hits: Tensor) -> tuple[float, float]:
    """Return the share of True, in percent, and its standard error over trials."""
    share = float(hits.double().mean())
    return 100 * share, 100 * (share * (1 - share) / len(hits)) ** 0.5


@dataclass(frozen=True)
class Trained:
    """What is drawn of a network."""

    name: str
    before: Tensor
    """Its recurrent weights at the first step, of shape ``(postsynaptic, presynaptic)``."""
    after: Tensor
    """Those at the end."""
    psychometric: list[tuple[float, float, float]]
    """Signed coherence in percent, how often it chose right in percent, and the standard error of that."""


def train(name: str, model: nn.Module, units: str, rate: float, steps: int, task: Task) -> Trained:
    """Give a network signs and a mask, let it learn, test and audit it.

    Args:
        name: of the network.
        model: the network.
        units: path of the layer that makes the units.
        rate: learning rate to begin with.
        steps: of the optimizer, a count.
        task: what it learns.
    """
    print(f"{name}:")

    # 1. Signs and a mask, from the first step. The readout sees of each unit only what its sign allows, too;
    # stimuli are no units, and their weights are free. Learning rates stay equal, to look at one thing at a
    # time. In a loop that Python runs, only an example can tell who reads whose units.
    config = biofx.BioConfig(
        apply_dales_principle=True,
        dales_constrain_inputs=False,
        dales_constrain_readout=True,
        weight_mask_self_connections=False,
        fuzzy_lr_distribution=biofx.Distribution.BASELINE,
    ).override(units, dales_signs=SIGNS)
    example = task.trials(2, seed=0).observations
    bio_model, report = biofx.transform(model, config, example_inputs=(example,))
    for of_pass in report.passes:
        for remark in of_pass.remarks:
            print(f"  {remark}")
    before = recurrent_weights(bio_model)

    # 2. Learn. `attach` writes signs back after every step, whatever the optimizer did.
    optimizer = torch.optim.AdamW(bio_model.parameters(), lr=rate)
    plasticity = biofx.attach(bio_model, optimizer)
    learn(bio_model, optimizer, task, steps)
    plasticity.detach()

    # 3. An audit of the effective weights: every unit has one sign, none connects to itself.
    print(f"  audit: {biofx.check(bio_model).raise_if_broken().summary()}")

    # 4. How well does it decide? Of the trials without any evidence, no more than half can be right.
    test = task.test_trials(100, seed=1_000_000)
    chosen = choices(bio_model, test)
    of_task = torch.isin(test.coherences.abs(), torch.tensor(COHERENCES))
    mean, error = mean_and_error((chosen == test.targets[-1])[of_task])
    print(f"  decides right in {mean:.1f} ± {error:.1f} % of the trials, after {steps} steps")
    psychometric = []
    for coherence in test.coherences.unique():
        chose_right = chosen[test.coherences == coherence] == 1 + RIGHT
        psychometric.append((float(coherence), *mean_and_error(chose_right)))
    return Trained(name, before, recurrent_weights(bio_model), psychometric)


def recurrent_weights(model: nn.Module) -> Tensor:
    """Return the recurrent weights that act, with signs and mask; shape ``(postsynaptic, presynaptic)``."""
    weights = dict(biofx.deploy(model).named_parameters())
    found = next(weight for weight in weights.values() if weight.shape == (UNITS, UNITS))
    return found.detach()


def draw(networks: list[Trained], path: Path) -> None:
    """Draw what each network chooses, the eigenvalues of its recurrent weights, and the weights."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # neurogym sets a font that few machines have
    figure = Figure(figsize=(12, 3.9 * len(networks)), layout="constrained")
    rows = figure.subplots(len(networks), 3, squeeze=False)
    for (choice, plane, matrix), network in zip(rows, networks, strict=True):
        coherences, shares, errors = zip(*network.psychometric, strict=True)
        choice.errorbar(coherences, shares, errors, fmt="o-", color="black", markersize=4, capsize=3)
        choice.axhline(50, color="0.8", zorder=0)
        choice.axvline(0, color="0.8", zorder=0)
        choice.set_xscale("symlog", linthresh=6.4, base=2)
        ticks = [-51.2, -12.8, -3.2, 0, 3.2, 12.8, 51.2]
        choice.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        choice.set_xticks([], minor=True)
        choice.set(xlabel="coherence, to the right (%)", ylabel="chooses right (%)", ylim=(-4, 104))
        choice.set_title(network.name)

        drawn = (network.before, network.after)
        circle = numpy.exp(1j * numpy.linspace(0, 2 * numpy.pi, 200))
        plane.plot(circle.real, circle.imag, color="0.8", zorder=0)
        for weights, style, label in (
            (network.before, {"facecolors": "none", "edgecolors": "tab:orange"}, "before"),
            (network.after, {"color": "tab:purple"}, "after"),
        ):
            values = torch.linalg.eigvals(weights)
            label = f"{label}: radius {float(values.abs().max()):.2f}"
            plane.scatter(values.real, values.imag, s=16, linewidths=0.8, label=label, **style)
        reach = 1.08 * max(1.0, *(float(torch.linalg.eigvals(w).abs().max()) for w in drawn))
        plane.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="real part", ylabel="imaginary part")
        plane.set_box_aspect(1)
        plane.set_title("eigenvalues of the recurrent weights")
        plane.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2, fontsize="small", frameon=False)

        largest = float(network.after.abs().quantile(0.99))
        image = matrix.imshow(network.after, cmap="RdBu_r", vmin=-largest, vmax=largest)
        matrix.axvline(EXCITATORY - 0.5, color="black", linewidth=0.8)
        matrix.set(xlabel="from: excitatory | inhibitory unit", ylabel="to unit")
        matrix.set_title("recurrent weights")
        figure.colorbar(image, ax=matrix, shrink=0.85)
    figure.savefig(path, dpi=150)


def main(folder: Path, loop_steps: int, layer_steps: int) -> None:
    """Run the tutorial; leave networks.png in the folder."""
    task = Task()
    torch.manual_seed(0)
    loop = RateNetwork(task.inputs, task.actions)
    layer = PlainNetwork(task.inputs, task.actions)
    networks = [
        train("rates, in a loop", loop, "w_rec", 0.01, loop_steps, task),
        train("nn.RNN", layer, "rnn", 0.003, layer_steps, task),
    ]
    draw(networks, folder / "networks.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("biofx-ei"), help="folder for what it draws")
    parser.add_argument("--loop-steps", type=int, default=300)
    parser.add_argument("--layer-steps", type=int, default=1500)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for networks this small, threads wait for each other longer than they compute
    main(options.out, options.loop_steps, options.layer_steps)
