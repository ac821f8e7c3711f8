"""``biofx demo --digits``: a plain and a rewritten network learn to read handwritten digits, once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.config import BioConfig
from biofx.demo.curves import BIO, PLAIN, Outcome, Run
from biofx.demo.data import load_digits
from biofx.operators.sampling import generator_for
from biofx.transform import transform

CONFIG = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0.16)
WIDTH, LEARNING_RATE, MOMENTUM, BATCH = 16, 0.05, 0.9, 64
WIDER, SMALLER_STEP = 2, 4
"""The rewritten network is twice as wide, as splits halve the width of what is deployed, and takes a quarter
of the step, as two synapses for a connection on both sides of a hidden unit take steps four times as
large."""
TEST_DIGITS = 360
LOSS, ACCURACY = "loss", "accuracy"
"""Mean training loss of an epoch, in nats; fraction of the test digits read right after it."""


class Block(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape, ``(batch, width, height, width)``."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(inner)))


class DigitNet(nn.Module):
    """A small residual network for images of shape ``(batch, 1, 8, 8)``; returns ``(batch, 10)`` logits."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.block1 = Block(width)
        self.block2 = Block(width)
        self.readout = nn.Linear(width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.block1(torch.relu(self.stem(x)))
        x = F.max_pool2d(x, 2)
        x = F.max_pool2d(self.block2(x), 2)
        logits: Tensor = self.readout(x.flatten(1))
        return logits


def learn_digits(*, seed: int, seeds: int, epochs: int, after_epoch: Callable[[Run], object]) -> Outcome:
    """Train a plain and a rewritten network for each seed, on the same digits in the same order.

    Args:
        seed: of the first pair; the next ones have the numbers that follow.
        seeds: pairs of networks, a count >= 1.
        epochs: passes over the training set, a count >= 1.
        after_epoch: called with a run at the end of each of its epochs.
    """
    runs, reports = [], []
    for own in range(seed, seed + seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own)
            plain = DigitNet()
            wide = DigitNet(WIDER * WIDTH)
        bio, report = transform(wide, CONFIG.replace(seed=own))
        reports.append(report)
        networks: dict[str, nn.Module] = {PLAIN: plain, BIO: bio}
        for name, network in networks.items():
            run, rate = Run(name, own), LEARNING_RATE / (SMALLER_STEP if name == BIO else 1)
            runs.append(run)
            _learn(network, rate, run, epochs, after_epoch)
    return Outcome(runs, reports[0])


def _learn(
    network: nn.Module, rate: float, run: Run, epochs: int, after_epoch: Callable[[Run], object]
) -> None:
    images, labels = load_digits()
    images = images.unsqueeze(1)
    order = torch.randperm(len(labels), generator=generator_for(run.seed, "split", purpose="demo"))
    test, train = order[:TEST_DIGITS], order[TEST_DIGITS:]
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=MOMENTUM)
    for epoch in range(epochs):
        generator = generator_for(run.seed, "order", epoch, purpose="demo")
        network.train()
        total = 0.0
        for batch in train[torch.randperm(len(train), generator=generator)].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        network.eval()
        with torch.no_grad():
            right = network(images[test]).argmax(1) == labels[test]
        run.add(**{LOSS: total / len(train), ACCURACY: right.float().mean().item()})
        after_epoch(run)
