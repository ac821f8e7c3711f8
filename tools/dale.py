"""What Dale's principle costs in accuracy on handwritten digits: ``python tools/dale.py``.

Each arm has its own learning rate, chosen on validation digits from one grid, which falls linearly to 0.
Arms are paired by seed: equal split, equal initial weights, equal order of batches. Prints means and standard
errors over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import biofx
from biofx.demo import DigitNet
from biofx.toml import write_whole
from reproduce.data import digits
from reproduce.networks import perceptron
from reproduce.summary import with_error
from reproduce.training import GRID, train

SEEDS = tuple(range(8))
_PLAIN_RATES = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0, apply_dales_principle=True)
ARMS: dict[str, biofx.BioConfig | None] = {
    "plain": None,
    "project": _PLAIN_RATES,
    "expand": _PLAIN_RATES.replace(dales_method="expand"),
    "project, kept weights": _PLAIN_RATES.replace(dales_initialisation="keep"),
}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "perceptron": (perceptron, 30),
    "residual CNN": (DigitNet, 12),
}
"""What makes each network, and for how many epochs it learns."""


def run(network: str, arm: str, rate: float, seed: int) -> tuple[float, float]:
    """Train one network; return its accuracy on validation and on test digits, in percent."""
    torch.manual_seed(seed)
    make, epochs = NETWORKS[network]
    model = make()
    config = ARMS[arm]
    if config is not None:
        model, _ = biofx.transform(model, config.replace(seed=seed))
    return train(model, digits(seed), rate=rate, epochs=epochs, seed=seed)


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
            told = "" if arm == "plain" else with_error(differences)
            table.add_row(network, arm, f"{result['learning_rate']:g}", with_error(result["test"]), told)
    Console().print(table)
    if options.json:
        write_whole(options.json, json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
