"""Learning that goes on: digits whose pixels are put in a new order for each task.

A task shows the digits once, a batch at a time, and each batch is judged before it is learned from. Nothing
of one task helps with the next but being able to learn, so that is what a fall over the tasks is the loss of.

Sources: Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton, "Loss of plasticity in deep continual
learning", Nature 632 (2024), doi 10.1038/s41586-024-07711-7 (online permuted images, there of MNIST); Sokar,
Agarwal, Castro, Evci, "The dormant neuron phenomenon in deep reinforcement learning", ICML 2023, arXiv
2302.12902 (ReDo, which replaces dormant units).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.config import BioConfig
from biofx.demo.curves import BIO, PLAIN, Outcome, Run
from biofx.demo.data import load_digits
from biofx.operators.rate_sampling import Distribution
from biofx.operators.sampling import generator_for
from biofx.plasticity.attach import attach
from biofx.plasticity.optimizer_step import LayerStep
from biofx.plasticity.rule import Rule
from biofx.transform import transform

CONFIG = BioConfig(fuzzy_lr_distribution=Distribution.BASELINE, unit_turnover="redo")
"""Nothing but the turnover of units, so that nothing else can be what helps."""
RULE = Rule("rejuvenate_units", every=10)
WIDTH, LEARNING_RATE, BATCH = 100, 5e-3, 32
"""The learning rate is the one at which the plain network does best in the first ten tasks."""
ACCURACY, SILENT = "accuracy", "silent_units"
"""Fraction of a task's digits read right, each before it was learned from; fraction of the hidden units that
are 0 for each of these digits at the end of the task."""


def permuted_digits_network() -> nn.Sequential:
    """Return a network of two hidden layers for images of shape ``(batch, 64)``; it gives ``(batch, 10)``."""
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )


def learn_on(*, seed: int, seeds: int, tasks: int, after_task: Callable[[Run], object]) -> Outcome:
    """Train a plain and a rewritten network for each seed: same weights, tasks, batches and optimizer.

    Args:
        seed: of the first pair; the next ones have the numbers that follow.
        seeds: pairs of networks, a count >= 1.
        tasks: a count >= 1.
        after_task: called with a run at the end of each of its tasks.
    """
    runs, reports = [], []
    for own in range(seed, seed + seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own)
            plain = permuted_digits_network()
        bio, report = transform(plain, CONFIG.replace(seed=own))
        reports.append(report)
        networks: dict[str, nn.Module] = {PLAIN: plain, BIO: bio}
        for name, network in networks.items():
            run = Run(name, own)
            runs.append(run)
            _learn(network, run, tasks, after_task)
    return Outcome(runs, reports[0])


def _learn(network: nn.Module, run: Run, tasks: int, after_task: Callable[[Run], object]) -> None:
    images, labels = load_digits()
    pixels = (images - images.mean()).div(images.std()).flatten(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)

    def count_replaced(step: int, layers: Mapping[str, LayerStep]) -> None:
        run.replaced_units += sum(layer.touched.get(RULE.name, 0) for layer in layers.values())

    if run.name == BIO:
        attach(network, optimizer, [RULE], observers=[count_replaced])
    network.train()
    for task in range(tasks):
        generator = generator_for(run.seed, "permuted digits", task, purpose="demo")
        seen = pixels[:, torch.randperm(pixels.shape[1], generator=generator)]
        right = 0.0
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            logits = network(seen[batch])
            right += (logits.detach().argmax(1) == labels[batch]).sum().item()
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
        run.add(**{ACCURACY: right / len(labels), SILENT: silent_units(network, seen)})
        after_task(run)


@torch.no_grad()
def silent_units(network: nn.Module, images: Tensor) -> float:
    """Return the fraction of the units behind ReLUs that are 0 for every image.

    Args:
        network: plain or rewritten; it is left in training mode.
        images: all that are looked at, ``(count, pixels)``.
    """
    silent: list[Tensor] = []

    def look(module: nn.Module, inputs: object, output: Tensor) -> None:
        silent.append((output == 0).all(0))

    hooks = [m.register_forward_hook(look) for m in network.modules() if isinstance(m, nn.ReLU)]
    network.eval()
    network(images)
    network.train()
    for hook in hooks:
        hook.remove()
    return torch.cat(silent).float().mean().item()
