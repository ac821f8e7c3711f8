# %% [markdown]
"""# Excitatory and inhibitory units that decide

Which of two noisy stimuli is stronger on average? Monkeys answer such questions, and networks of
computational neuroscience are trained on them. Here the task comes from neurogym, and two networks of 80
excitatory and 20 inhibitory units learn it: one is written by hand as a loop over time, with leak and
noise, the other is an `nn.RNN`. From the first step each unit has one sign at all of its synapses, and
none connects to itself. How often each network chooses right, and the eigenvalues of its recurrent
weights, end up in one picture. It takes about four minutes, as a notebook or as `python
tools/tutorials/ei_network.py`; nothing is downloaded. It needs `pip install -e ".[neuro]" -c
tools/constraints.txt`.
"""

# %%
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import neurogym
import numpy
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from learning import show

matplotlib.rcdefaults()  # neurogym sets a font that few machines have

# %% tags=["parameters"]
LOOP_STEPS, LAYER_STEPS = 300, 1500  # of the optimizer
FOLDER = Path("biofx-ei")  # for the picture

# %%
UNITS, EXCITATORY = 100, 80
SIGNS = [1] * EXCITATORY + [-1] * (UNITS - EXCITATORY)
STEP, TIME_CONSTANT = 50, 100  # of the simulation and of the units, in milliseconds
torch.set_num_threads(1)  # for networks this small, threads wait for each other longer than they compute
FOLDER.mkdir(parents=True, exist_ok=True)

# %% [markdown]
"""## The task

Perceptual decision making, as neurogym has it (after Britten, Shadlen, Newsome, Movshon 1992). A trial
has at each step a fixation signal and two stimuli, and a right action: 0 is to fixate, 1 and 2 are
choices. The coherence says how much stronger one stimulus is, in percent; here it is positive where that
is the one on the right.
"""

# %%
LEFT, RIGHT = 0, 1
COHERENCES = (0.0, 6.4, 12.8, 25.6, 51.2)  # those of the task
FINER = (1.6, 3.2)  # others, to see the curve between them

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the environment does not say how to draw it
    environment: Any = neurogym.make("PerceptualDecisionMaking-v0", dt=STEP).unwrapped
inputs, actions = environment.observation_space.shape[0], int(environment.action_space.n)


def gathered(trials: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return observations (time, trials, inputs), right actions (time, trials), and signed coherences."""
    observations, targets, coherences = [], [], []
    for trial in trials:  # each is made when it is asked for
        observations.append(environment.ob)
        targets.append(environment.gt)
        coherences.append(trial["coh"] if trial["ground_truth"] == RIGHT else -trial["coh"])
    return (
        torch.tensor(numpy.stack(observations, 1), dtype=torch.float32),
        torch.tensor(numpy.stack(targets, 1)),
        torch.tensor(numpy.array(coherences, dtype=numpy.float32)),
    )


def random_trials(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return trials of random coherence and side."""
    environment.seed(seed)
    return gathered(environment.new_trial() for _ in range(count))


def test_trials(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return as many trials of each coherence and side."""
    environment.seed(seed)
    return gathered(
        environment.new_trial(coh=coherence, ground_truth=side)
        for coherence in (*COHERENCES, *FINER)
        for side in (LEFT, RIGHT)
        for _ in range(count)
    )


example, _, _ = random_trials(2, seed=0)
print(f"{inputs} inputs, {actions} actions, {len(example)} steps a trial")

# %% [markdown]
"""## Two networks

Rates of units with leak and noise (Song, Yang, Wang, PLOS Computational Biology 2016, equation 1), as
neuroscience writes them: a loop over time.
"""


# %%
class RateNetwork(nn.Module):
    """Returns an activity for each action at each step."""

    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        self.w_in, self.w_rec = nn.Linear(inputs, UNITS, bias=False), nn.Linear(UNITS, UNITS)
        self.w_out = nn.Linear(UNITS, actions)
        self.alpha, self.noise = STEP / TIME_CONSTANT, noise

    def forward(self, x: Tensor) -> Tensor:
        """Run through ``x`` of shape ``(time, trials, inputs)``."""
        state = x.new_zeros(x.shape[1], UNITS)
        rate, outputs = torch.relu(state), []
        for observation in x:
            drive = self.w_rec(rate) + self.w_in(observation)
            drive = drive + self.noise * (2 / self.alpha) ** 0.5 * torch.randn_like(state)
            state = (1 - self.alpha) * state + self.alpha * drive
            rate = torch.relu(state)
            outputs.append(self.w_out(rate))
        return torch.stack(outputs)


# %% [markdown]
"""The same with the recurrent layer of torch, which has neither leak nor noise."""


# %%
class PlainNetwork(nn.Module):
    """Returns an activity for each action at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(inputs, UNITS, nonlinearity="relu")
        self.w_out = nn.Linear(UNITS, actions)

    def forward(self, x: Tensor) -> Tensor:
        """Run through ``x`` of shape ``(time, trials, inputs)``."""
        logits: Tensor = self.w_out(self.rnn(x)[0])
        return logits


torch.manual_seed(0)
loop, layer = RateNetwork(), PlainNetwork()

# %% [markdown]
"""## Signs and a mask, from the first step

The readout sees of each unit only what its sign allows, too; stimuli are no units, and their weights are
free. Learning rates stay equal, to look at one thing at a time. In a loop that Python runs, only an
example can tell who reads whose units. The signs are given where the units are made.
"""

# %%
config = biofx.BioConfig(
    apply_dales_principle=True,
    dales_constrain_inputs=False,
    dales_constrain_readout=True,
    weight_mask_self_connections=False,
    fuzzy_lr_distribution=biofx.Distribution.BASELINE,
)


def with_signs(network: nn.Module, units: str) -> nn.Module:
    """Return the rewritten network; ``units`` is the path of the layer that makes the units."""
    of_layer = config.override(units, dales_signs=SIGNS)
    bio_model, report = biofx.transform(network, of_layer, example_inputs=(example,))
    for of_pass in report.passes:
        for remark in of_pass.remarks:
            print(remark)
    return bio_model


bio_loop = with_signs(loop, "w_rec")

# %%
bio_layer = with_signs(layer, "rnn")

# %% [markdown]
"""The weights that act, with signs and mask, are those of what would be deployed."""


# %%
def recurrent_weights(network: nn.Module) -> Tensor:
    """Return the recurrent weights that act, of shape ``(postsynaptic, presynaptic)``."""
    weights = dict(biofx.deploy(network).named_parameters())
    return next(weight.detach() for weight in weights.values() if weight.shape == (UNITS, UNITS))


before = [recurrent_weights(network) for network in (bio_loop, bio_layer)]

# %% [markdown]
"""## Learning

A loop as you have it, with not a word of signs or masks in it. `attach` writes signs back after every
step, whatever the optimizer did. An audit of the effective weights follows: every unit has one sign,
none connects to itself.
"""


# %%
def learn(network: nn.Module, rate: float, steps: int) -> None:
    """Train, with a learning rate that falls from ``rate`` to 0."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    plasticity = biofx.attach(network, optimizer)
    network.train()
    for step in range(steps):
        observations, right, _ = random_trials(32, seed=1 + step)
        logits, targets = network(observations).flatten(0, 1), right.flatten()
        errors, decides = F.cross_entropy(logits, targets, reduction="none"), targets > 0
        loss = errors[decides].mean() + errors[~decides].mean()  # decisions are short
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    plasticity.detach()
    print(biofx.check(network).raise_if_broken().summary())


learn(bio_loop, rate=0.01, steps=LOOP_STEPS)

# %%
learn(bio_layer, rate=0.003, steps=LAYER_STEPS)

# %% [markdown]
"""## How well do they decide?

What counts is the choice at the end of each trial. Of the trials without any evidence, no more than half
can be right.
"""


# %%
def mean_and_error(hits: Tensor) -> tuple[float, float]:
    """Return the share of True, in percent, and its standard error over trials."""
    share = float(hits.double().mean())
    return 100 * share, 100 * (share * (1 - share) / len(hits)) ** 0.5


@torch.no_grad()
def psychometric(name: str, network: nn.Module) -> list[tuple[float, float, float]]:
    """Return for each signed coherence how often right was chosen, in percent, and its standard error."""
    observations, targets, coherences = test_trials(100, seed=1_000_000)
    network.eval()
    chosen = network(observations)[-1].argmax(-1)
    of_task = torch.isin(coherences.abs(), torch.tensor(COHERENCES))
    mean, error = mean_and_error((chosen == targets[-1])[of_task])
    print(f"{name}: decides right in {mean:.1f} ± {error:.1f} % of the trials")
    values = coherences.unique()
    return [(float(value), *mean_and_error(chosen[coherences == value] == 1 + RIGHT)) for value in values]


names = ("rates, in a loop", "nn.RNN")
curves = [psychometric(name, network) for name, network in zip(names, (bio_loop, bio_layer), strict=True)]
after = [recurrent_weights(network) for network in (bio_loop, bio_layer)]

# %% [markdown]
"""## The picture

Left, how often right was chosen at each strength of evidence. In the middle, the eigenvalues of the
recurrent weights before and after. On the right, the recurrent weights: red columns excite, blue ones
inhibit, and the diagonal is empty.
"""


# %%
def draw_choices(axes: Any, name: str, curve: list[tuple[float, float, float]]) -> None:
    """Draw how often right was chosen."""
    coherences, shares, errors = zip(*curve, strict=True)
    axes.errorbar(coherences, shares, errors, fmt="o-", color="black", markersize=4, capsize=3)
    axes.axhline(50, color="0.8", zorder=0)
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_xscale("symlog", linthresh=6.4, base=2)
    ticks = [-51.2, -12.8, -3.2, 0, 3.2, 12.8, 51.2]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="coherence, to the right (%)", ylabel="chooses right (%)", ylim=(-4, 104), title=name)


def draw_eigenvalues(axes: Any, first: Tensor, last: Tensor) -> None:
    """Draw the eigenvalues of recurrent weights before and after."""
    circle, reach = numpy.exp(1j * numpy.linspace(0, 2 * numpy.pi, 200)), 1.0
    axes.plot(circle.real, circle.imag, color="0.8", zorder=0)
    styles = ({"facecolors": "none", "edgecolors": "tab:orange"}, {"color": "tab:purple"})
    for weights, style, label in zip((first, last), styles, ("before", "after"), strict=True):
        values = torch.linalg.eigvals(weights)
        radius = float(values.abs().max())
        reach = max(reach, 1.08 * radius)
        label = f"{label}: radius {radius:.2f}"
        axes.scatter(values.real, values.imag, s=16, linewidths=0.8, label=label, **style)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="real part", ylabel="imaginary part")
    axes.set_box_aspect(1)
    axes.set_title("eigenvalues of the recurrent weights")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2, fontsize="small", frameon=False)


def draw_weights(axes: Any, weights: Tensor) -> None:
    """Draw recurrent weights."""
    largest = float(weights.abs().quantile(0.99))
    image = axes.imshow(weights, cmap="RdBu_r", vmin=-largest, vmax=largest)
    axes.axvline(EXCITATORY - 0.5, color="black", linewidth=0.8)
    axes.set(xlabel="from: excitatory | inhibitory unit", ylabel="to unit", title="recurrent weights")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)


# %%
figure = Figure(figsize=(12, 7.8), layout="constrained")
rows = figure.subplots(2, 3)
for row, name, curve, first, last in zip(rows, names, curves, before, after, strict=True):
    draw_choices(row[0], name, curve)
    draw_eigenvalues(row[1], first, last)
    draw_weights(row[2], last)
figure.savefig(FOLDER / "networks.png", dpi=60)
show(FOLDER / "networks.png")
