"""What biofx costs: ``python tools/bench [--compiled] [--series] [--memory] [--only WORD] [--json FILE]``.

Each work is a table of candidates that do the same: the unmodified model, biofx, the paper's package where it
is installed (``pip install pytorch-bio-transformations==0.0.5``), and the floor: the same layers made at the
folded width, which is as fast as a fold could be. Candidates run in turn within each round; figures are
medians and their ratios to the first. On CUDA where there is one, else on the CPU (``--device``); ``--large``
times ResNet-50, ViT-B/16 and GPT-2 small instead, at their real sizes, which are for a GPU, or tiny.
"""

from __future__ import annotations

import argparse
import gc
import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from growth import MEMORY_GOALS, memory, transform_times
from rich.console import Console
from rich.table import Table
from timing import interleaved
from works import Work, large_works, series, works


def measured(work: Work, rounds: int, *, cpu_time: bool) -> dict[str, Any]:
    """Return a work's figures: seconds, and ratios to the candidate that it is measured against."""
    seconds = interleaved(work.candidates, rounds, cpu_time=cpu_time)
    ratios = {name: value / seconds[work.against] for name, value in seconds.items()}
    return {
        "work": work.name,
        "against": work.against,
        "seconds": seconds,
        "ratios": ratios,
        "goals": {name: goal for name, goal in work.goals.items() if name in seconds},
        "in_percent": work.in_percent,
    }


def table_of(row: dict[str, Any]) -> Table:
    """Return a work's figures for ``rich.print``."""
    table = Table(title=row["work"], title_justify="left", box=None)
    unit, factor = (" %", 100) if row["in_percent"] else ("", 1)
    for column in ("candidate", "ms", f"/ {row['against']}", "goal"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for name, value in row["seconds"].items():
        goal = row["goals"].get(name)
        met = goal is None or row["ratios"][name] <= goal
        shown = f"[{'green' if met else 'red'}]{goal * factor:.2f}{unit}[/]" if goal is not None else ""
        ratio = f"{row['ratios'][name] * factor:.3f}{unit}"
        table.add_row(name, f"{value * 1e3:.{2 if row['in_percent'] else 1}f}", ratio, shown)
    return table


def table_of_memory(found: dict[str, Any]) -> Table:
    """Return peak memory for ``rich.print``."""
    table = Table(title="FCNet, peak memory of its training", title_justify="left", box=None)
    for column in ("candidate", "MB", "above plain / parameters", "goal"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for name, excess in found["excess_over_parameters"].items():
        goal = MEMORY_GOALS.get(name)
        shown = f"[{'green' if excess <= goal else 'red'}]{goal:.2f}[/]" if goal is not None else ""
        table.add_row(name, f"{found['peak_bytes'][name] / 1e6:.0f}", f"{excess:.3f}", shown)
    return table


def main() -> None:
    """Run the benchmark, print tables and write JSON if asked to."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--compiled", action="store_true", help="compile every training step")
    parser.add_argument("--series", action="store_true", help="grow sizes, to see how costs grow")
    parser.add_argument(
        "--memory", action="store_true", help="measure peak memory, in processes of their own"
    )
    parser.add_argument("--threads", type=int, help="threads to compute with")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time what the process computes, not what it waits for"
    )
    parser.add_argument("--only", default="", help="only works whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--device", help="where to (default: cuda where there is one, else cpu)")
    parser.add_argument("--large", choices=["real", "tiny"], help="time ResNet-50, ViT-B/16 and GPT-2 small")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    clock = "CPU time" if options.cpu_time else "time"
    console = Console()
    console.print(
        f"{device.type}, {name}, torch {torch.__version__}, {clock}, medians of {options.rounds} rounds"
    )
    if options.large is None:
        found = works(device, compiled=options.compiled)
    else:
        found = large_works(device, tiny=options.large == "tiny", compiled=options.compiled)
    rows: list[dict[str, Any]] = []
    for work in chain(found, series(device) if options.series else ()):
        if options.only in work.name:
            rows.append(measured(work, options.rounds, cpu_time=options.cpu_time))
            console.print(table_of(rows[-1]))
        del work
        gc.collect()
    grown: dict[str, Any] = {}
    if options.series:
        grown["transform"] = transform_times()
        console.print(grown)
    if options.memory:
        grown["memory"] = memory()
        console.print(table_of_memory(grown["memory"]))
    if options.json:
        about = {"device": str(device), "name": name, "torch": torch.__version__, "rounds": options.rounds}
        about["clock"] = "process" if options.cpu_time else "wall"
        content = {"schema": "biofx.bench/1", **about, "works": rows, **grown}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
