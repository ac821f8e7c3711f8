"""Which mechanism does what to accuracy? ``python tools/reproduce --out FOLDER``.

Trains each mechanism and its control on each network for each seed, at each learning rate of one grid. A rate
is chosen per arm, on validation images. Arms are paired by seed: equal split, initial weights and order of
batches. Each finished run is a file in FOLDER/runs: a command that was stopped goes on where it was when it
is given again. Under torchrun (``torchrun --nproc-per-node=4 tools/reproduce --out FOLDER``) the runs are
dealt out to the ranks, and the one that finishes last writes results.json, table.md and plot.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from biofx.errors import BiofxError, InputError
from biofx.toml import write_whole
from reproduce.arms import MECHANISMS
from reproduce.data import DATASETS, loader
from reproduce.networks import NETWORKS
from reproduce.runs import Job, Results, execute
from reproduce.summary import contrasts, plot, rows, table_of, to_markdown
from reproduce.training import GRID


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; return the exit code: 1 for a user's mistake, which is one line on stderr."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        _reproduce(options)
    except BiofxError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    return 0


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return every run that is asked for, each once, in the same order on every rank.

    Raises:
        InputError: epochs, seeds or learning rates make no sense.
    """
    too_few = options.epochs is not None and options.epochs < 1
    if too_few or min(options.seeds) < 0 or min(options.rates) <= 0:
        raise InputError("expected --epochs >= 1, --seeds >= 0 and --rates > 0")
    arms = dict.fromkeys(
        arm for name in options.mechanism for arm in (MECHANISMS[name].arm, MECHANISMS[name].control)
    )
    return [
        Job(options.dataset, network, arm, rate, seed, options.epochs or NETWORKS[network].epochs)
        for seed in dict.fromkeys(options.seeds)
        for network in dict.fromkeys(options.network)
        for arm in arms
        for rate in dict.fromkeys(options.rates)
    ]


def own_share(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs of this rank, which torchrun tells by the environment.

    Raises:
        InputError: ``RANK`` and ``WORLD_SIZE`` are no rank and number of ranks.
    """
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        raise InputError(f"expected RANK below WORLD_SIZE, found {rank!r} and {ranks!r}")
    return list(jobs[int(rank) :: int(ranks)])


def _reproduce(options: argparse.Namespace) -> None:
    load, results, jobs = (
        loader(options.dataset, options.data),
        Results(options.out / "runs"),
        jobs_of(options),
    )
    share, console = own_share(jobs), Console(stderr=True)
    waiting = [job for job in share if results.find(job) is None]
    console.print(f"{len(share)} runs, {len(share) - len(waiting)} of them finished already", highlight=False)
    for job in track(waiting, description="training", console=console, disable=not console.is_terminal):
        results.keep(execute(job, load))
    found = results.find_all(jobs)
    if found is None:
        return
    compared = contrasts(rows(found), options.mechanism)
    seeds = ", ".join(map(str, options.seeds))
    Console().print(table_of(compared, f"{options.dataset}, seeds {seeds}: mean ± standard error"))
    summary = [{**asdict(contrast), "differences": contrast.differences} for contrast in compared]
    write_whole(options.out / "results.json", json.dumps(summary, indent=2) + "\n")
    write_whole(options.out / "table.md", to_markdown(compared))
    plot(compared, options.out / "plot.png")


def _parser() -> argparse.ArgumentParser:
    told = "\n".join(
        f"  {name}: {entry.arm!r} against {entry.control!r}; in common: {entry.common}"
        for name, entry in MECHANISMS.items()
    )
    parser = argparse.ArgumentParser(
        prog="tools/reproduce",
        description=__doc__,
        epilog=f"mechanisms:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--data", type=Path, help="folder with the files of mnist or cifar10")
    parser.add_argument("--mechanism", nargs="+", choices=list(MECHANISMS), default=list(MECHANISMS))
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(8)), help="default: 0 to 7")
    parser.add_argument("--rates", nargs="+", type=float, default=list(GRID), help="learning rates")
    parser.add_argument("--epochs", type=int, help="default: 30 for the perceptron, 12 for residual")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    return parser
