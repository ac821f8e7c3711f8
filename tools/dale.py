"""What Dale's principle costs in accuracy on handwritten digits: ``python tools/dale.py``.

Each arm has its own learning rate, chosen on validation digits from one grid, which falls linearly to 0.
Arms are paired by seed: equal split, equal initial weights, equal order of batches. Prints means and standard
errors over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.demo import DigitNet
from biofx.toml import write_whole

GRID = (0.01, 0.02, 0.05, 0.1)
SEEDS = tuple(range(8))
BATCH, MOMENTUM = 64, 0.9
VALIDATION, TEST = 300, 500
_PLAIN_RATES = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0, apply_dales_principle=True)
ARMS: dict[str, biofx.BioConfig | None] = {
    "plain": None,
    "project": _PLAIN_RATES,
    "expand": _PLAIN_RATES.replace(dales_method="expand"),
    "project, kept weights": _PLAIN_RATES.replace(dales_initialisation="keep"),
}


def perceptron() -> nn.Module:
    """Return a network of four hidden layers for ``(batch, 1, 8, 8)``."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), *hidden, nn.Linear(64, 10))


NETWORKS = {"perceptron": (perceptron, 30), "residual CNN": (DigitNet, 12)}
"""What makes each network, and for how many epochs it learns."""


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training, validation and test images and labels, split by the seed."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    places = order[TEST + VALIDATION :], order[:VALIDATION], order[VALIDATION : VALIDATION + TEST]
    train, validation, test = ((images[place], labels[place]) for place in places)
    return train, validation, test


def run(network: str, arm: str, rate: float, seed: int) -> tuple[float, float]:
    """Train one network; return its accuracy on validation and on test digits, in percent."""
    train, validation, test = digits(seed)
    torch.manual_seed(seed)
    make, epochs = NETWORKS[network]
    model: nn.Module = make()
    config = ARMS[arm]
    if config is not None:
        model, _ = biofx.transform(model, config.replace(seed=seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(train[1]), generator=shuffle).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][batch]), train[1][batch]).backward()
            optimizer.step()
        decay.step()
    model.eval()
    with torch.no_grad():
        found = [100 * float((model(x).argmax(1) == y).float().mean()) for x, y in (validation, test)]
    return found[0], found[1]


def measure(network: str) -> dict[str, dict[str, Any]]:
    """Return for each arm the chosen learning rate and the test accuracies, by seed."""
    results: dict[str, dict[str, Any]] = {}
    jobs = [(arm, rate, seed) for arm in ARMS for rate in GRID for seed in SEEDS]
    found = {
        job: run(network, *job) for job in track(jobs, description=network, console=Console(stderr=True))
    }
    for arm in ARMS:
        validated = {rate: statistics.mean(found[arm, rate, seed][0] for seed in SEEDS) for rate in GRID}
        best = max(GRID, key=lambda rate: validated[rate])
        results[arm] = {
            "learning_rate": best,
            "validation": validated,
            "test": [found[arm, best, seed][1] for seed in SEEDS],
        }
    return results


def main() -> None:
    """Measure every network and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=list(NETWORKS), action="append")
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "network",
        "arm",
        "learning rate",
        "test accuracy [%]",
        "minus plain [%]",
        title="Dale's principle on digits",
    )
    everything = {}
    for network in options.network or NETWORKS:
        results = everything[network] = measure(network)
        for arm, result in results.items():
            differences = [
                own - plain for own, plain in zip(result["test"], results["plain"]["test"], strict=True)
            ]
            told = "" if arm == "plain" else _with_error(differences)
            table.add_row(network, arm, f"{result['learning_rate']:g}", _with_error(result["test"]), told)
    Console().print(table)
    if options.json:
        write_whole(options.json, json.dumps(everything, indent=2) + "\n")


def _with_error(values: list[float]) -> str:
    """Return mean and standard error of the mean."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
