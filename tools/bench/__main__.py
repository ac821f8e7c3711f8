"""What plasticity costs: ``python tools/bench [--json FILE]``.

Every row is a ratio of medians measured interleaved in one run, so that a noisy machine disturbs both sides
alike. The reference package is compared with if it is installed
(``pip install pytorch-bio-transformations==0.0.5``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from biofx import BioConverter

RULES = ("volume_dependent_lr", "crystallize", "rejuvenate_weights", "fuzzy_learning_rates")
GOALS = {"volume_dependent_lr": 1 / 3, "crystallize": 1 / 5, "rejuvenate_weights": 1 / 5}


def fully_connected() -> nn.Module:
    """Return the network of the comparison: 18.5 million weights."""
    return nn.Sequential(
        nn.Linear(3072, 3000), nn.ReLU(), nn.Linear(3000, 3000), nn.ReLU(), nn.Linear(3000, 100)
    )


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return each candidate's median seconds, all of them timed in turn in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def with_gradients(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model with the gradients of a classification loss on random labels."""
    labels = torch.randint(0, 100, (len(x),), generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(x), labels).backward()
    return model


def bench_rules(rounds: int) -> list[dict[str, Any]]:
    """Time each rule on every layer, against the reference package where that is installed."""
    torch.manual_seed(0)
    x = torch.randn(100, 3072)
    models = {"biofx": with_gradients(BioConverter()(fully_connected()), x)}
    try:
        reference = importlib.import_module("bio_transformations")
        models["reference"] = with_gradients(reference.BioConverter()(fully_connected()), x)
    except ImportError:
        pass
    rows = []
    for rule in RULES:
        medians = interleaved({name: getattr(model, rule) for name, model in models.items()}, rounds)
        ratio = medians["biofx"] / medians["reference"] if "reference" in medians else None
        rows.append({"work": rule, **medians, "ratio": ratio, "goal": GOALS.get(rule)})
    return rows


def main() -> None:
    """Run the benchmark, print a table and write JSON if asked to."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rows = bench_rules(options.rounds)
    table = Table(title=f"rules on 18.5 M weights, {torch.get_num_threads()} threads, medians")
    for column in ("work", "biofx (ms)", "reference (ms)", "ratio", "goal"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in rows:
        numbers = [row["biofx"] * 1e3, row["reference"] * 1e3 if row.get("reference") else None]
        cells = [*(f"{number:.0f}" if number is not None else "-" for number in numbers)]
        cells += [f"{row[name]:.2f}" if row[name] is not None else "-" for name in ("ratio", "goal")]
        table.add_row(row["work"], *cells)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
