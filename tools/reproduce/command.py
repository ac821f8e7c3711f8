"""What was published, and what comes out here: ``python tools/reproduce NAME --out FOLDER``.

Runs every arm of an experiment for each seed, at the published learning rate and at those of a grid, from
which one is chosen for each arm. Arms are paired by seed: equal data, in equal order, and equal initial
weights. Each finished run is a file in FOLDER/NAME/runs: a command that was stopped goes on where it was when
it is given again. Under torchrun (``torchrun --nproc-per-node=4 tools/reproduce NAME --out FOLDER``) the runs
are dealt out to the ranks, and the one that finishes last writes results.json, table.md and plot.png. Without
a name it lists the experiments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from biofx.errors import BiofxError, InputError
from biofx.toml import write_whole
from reproduce.data import DATASETS, NONE, loader
from reproduce.experiment import Experiment, Job, Load
from reproduce.experiments import EXPERIMENTS
from reproduce.plots import plot
from reproduce.runs import Result, Results
from reproduce.summary import Row, rows, table_of, to_markdown, verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an experiment; return the exit code: 1 for a user's mistake, which is one line on stderr."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        if options.name is None:
            Console().print(listing())
        else:
            _reproduce(EXPERIMENTS[options.name], options)
    except BiofxError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    return 0


def listing() -> Table:
    """Return the experiments with their sources."""
    table = Table(box=None)
    for heading in ("experiment", "what it is", "source"):
        table.add_column(heading, no_wrap=heading == "experiment", overflow="fold")
    for experiment in EXPERIMENTS.values():
        table.add_row(experiment.name, experiment.about, experiment.source)
    return table


def jobs_of(experiment: Experiment, options: argparse.Namespace) -> list[Job]:
    """Return every run that is asked for, each once, in the same order on every rank.

    Raises:
        InputError: an arm, a case, a length, a seed or a learning rate does not exist or makes no sense.
    """
    arms = experiment.with_controls(_known("--arms", options.arms, experiment.arms))
    cases = _known("--cases", options.cases, experiment.cases)
    lengths = lengths_of(experiment, options.short)
    seeds = options.seeds if options.seeds is not None else range(experiment.seeds)
    if min(seeds) < 0 or any(rate <= 0 for rate in options.rates or ()):
        raise InputError("expected --seeds >= 0 and --rates > 0")
    return [
        Job(
            experiment=experiment.name,
            dataset=_dataset(experiment, options),
            case=case,
            arm=arm,
            rate=rate,
            seed=seed,
            lengths=tuple(lengths.items()),
        )
        for seed in dict.fromkeys(seeds)
        for case in cases
        for arm in arms
        for rate in _rates(experiment, case, options)
    ]


def lengths_of(experiment: Experiment, given: Sequence[str] | None) -> dict[str, int]:
    """Return the lengths of a run: in full, in short, or in full but for those that are given as NAME=NUMBER.

    Raises:
        InputError: there is no length of that name, or it is no number >= 1.
    """
    if given is None:
        return dict(experiment.lengths)
    lengths = dict(experiment.lengths if given else experiment.short)
    for entry in given:
        name, _, number = entry.partition("=")
        if name not in lengths or not number.isdecimal() or int(number) < 1:
            known = ", ".join(f"{known}={full}" for known, full in experiment.lengths.items())
            raise InputError(f"--short: expected NAME=NUMBER >= 1 of {known}, found {entry!r}")
        lengths[name] = int(number)
    return lengths


def own_share(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs of this rank, which torchrun tells by the environment.

    Raises:
        InputError: ``RANK`` and ``WORLD_SIZE`` are no rank and number of ranks.
    """
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        raise InputError(f"expected RANK below WORLD_SIZE, found {rank!r} and {ranks!r}")
    return list(jobs[int(rank) :: int(ranks)])


def _reproduce(experiment: Experiment, options: argparse.Namespace) -> None:
    if options.out is None:
        raise InputError("expected --out FOLDER for the results")
    jobs, folder = jobs_of(experiment, options), options.out / experiment.name
    load = loader(_dataset(experiment, options), options.data)
    results, share, console = Results(folder / "runs"), own_share(jobs), Console(stderr=True)
    waiting = [job for job in share if results.find(job) is None]
    console.print(f"{len(share)} runs, {len(share) - len(waiting)} of them finished already", highlight=False)
    for job in track(waiting, description="running", console=console, disable=not console.is_terminal):
        results.keep(execute(experiment, job, load))
    found = results.find_all(jobs)
    if found is None:
        return
    compared, title = rows(experiment, found), _title(jobs)
    Console().print(table_of(experiment, compared, f"{experiment.name}: {title}"))
    summary = {
        "rows": [_summary(experiment, row) for row in compared],
        "claims": verdicts(experiment, compared),
    }
    write_whole(folder / "results.json", json.dumps(summary, indent=2) + "\n")
    write_whole(folder / "table.md", to_markdown(experiment, compared, title))
    plot(experiment, compared, folder / "plot.png")


def execute(experiment: Experiment, job: Job, load: Load) -> Result:
    """Execute one job."""
    return Result(job, experiment.run(job, load))


def _title(jobs: Sequence[Job]) -> str:
    seeds = len({job.seed for job in jobs})
    lengths = ", ".join(f"{number} {name}" for name, number in jobs[0].lengths)
    data = f", {jobs[0].dataset}" if jobs[0].dataset != NONE else ""
    return f"Mean ± standard error over {seeds} seed{'s'[: seeds > 1]}, {lengths}{data}"


def _summary(experiment: Experiment, row: Row) -> dict[str, Any]:
    name = next(iter(experiment.measures))
    figures = {measure: row.values(measure) for measure in experiment.measures}
    place = {"case": row.case, "arm": row.arm, "rate": row.rate, "chosen": row.chosen}
    return {**place, **figures, "differences": row.differences(name)}


def _dataset(experiment: Experiment, options: argparse.Namespace) -> str:
    if not experiment.needs_images:
        return NONE
    given: str | None = options.dataset
    return given or ("digits" if options.data is None else "fashion-mnist")


def _known(option: str, given: Sequence[str] | None, known: Any) -> list[str]:
    unknown = [name for name in given or () if name not in known]
    if unknown:
        raise InputError(f"{option}: expected some of {', '.join(map(repr, known))}, found {unknown[0]!r}")
    return list(dict.fromkeys(given or known))


def _rates(experiment: Experiment, case: str, options: argparse.Namespace) -> Sequence[float]:
    entry = experiment.cases[case]
    if options.rates is not None:
        return list(dict.fromkeys(options.rates))
    return (entry.fixed,) if options.fixed and entry.fixed is not None else entry.rates


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", choices=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--data", type=Path, help="folder with the files of a data set, packed by gzip or not"
    )
    parser.add_argument("--dataset", choices=DATASETS, help="default: fashion-mnist with --data, else digits")
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="default: as many as the experiment says, from 0"
    )
    parser.add_argument(
        "--arms", nargs="+", help="default: all; those that they are compared with come along"
    )
    parser.add_argument("--cases", nargs="+", help="default: all")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates, instead of the experiment's")
    parser.add_argument("--fixed", action="store_true", help="the published learning rate alone, none chosen")
    parser.add_argument(
        "--short",
        nargs="*",
        metavar="NAME=NUMBER",
        help="shorter: as the experiment says, or by these lengths",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    return parser
