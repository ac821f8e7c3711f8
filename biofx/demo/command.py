"""What ``biofx demo`` shows: progress, a screen of results, and files with the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from biofx.demo import continual, digits
from biofx.demo.curves import BIO, PLAIN, Outcome, Run, mean_and_error, with_error
from biofx.demo.data import require_extras
from biofx.demo.picture import Panel, Picture
from biofx.errors import InputError
from biofx.toml import write_whole

FOLDER, DIGITS_FOLDER = Path("biofx-demo"), Path("biofx-demo-digits")
LABELS = {PLAIN: "plain", BIO: "rewritten"}


def run_demo(*, seed: int = 0, seeds: int = 3, tasks: int = 60, folder: Path = FOLDER) -> Outcome:
    """Show learning that goes on: where a plain network loses its plasticity, and a rewritten one does not.

    Args:
        seed: decides initial weights, tasks, order of the batches and every draw of biofx; equal seeds give
            equal numbers.
        seeds: pairs of networks, with the numbers from ``seed`` on, a count >= 1.
        tasks: orders of the pixels that a network learns one after another, a count >= 1.
        folder: made if it is not there; gets ``curves.png``, ``report.html``, ``report.json`` and
            ``results.json``.

    Raises:
        InputError: scikit-learn or matplotlib is missing, a number is out of range, or the folder cannot be
            made.
    """
    console = _begin(folder, seed=seed, seeds=seeds, tasks=tasks)
    _say(
        console,
        f"Learning that goes on: {tasks} tasks. Each shows the same 1797 handwritten digits once, with their "
        "pixels in a new order, to a plain network and to one that biofx has rewritten.",
    )
    with _progress(console, seeds * tasks, continual.ACCURACY) as after_task:
        outcome = continual.learn_on(seed=seed, seeds=seeds, tasks=tasks, after_task=after_task)
    few = max(1, tasks // 6)
    first, last = slice(few), slice(tasks - few, tasks)
    _show_table(
        console,
        outcome,
        "digits read right before they were learned from (%)",
        [
            (_numbers("task", first), continual.ACCURACY, first),
            (_numbers("task", last), continual.ACCURACY, last),
            ("units silent then", continual.SILENT, last),
        ],
    )
    _say(
        console,
        f"What was changed: watch-units observes the {2 * continual.WIDTH} hidden units, and every "
        f"{continual.RULE.every} steps rejuvenate_units makes those anew that are dormant (ReDo). "
        f"All else is equal: first weights, Adam, its rate of {continual.LEARNING_RATE}, batches.",
    )
    picture = Picture(
        _headline(outcome, first, last),
        "The same 1797 handwritten digits for each task, each seen once, with their pixels in a new order.\n"
        f"Two hidden layers of {continual.WIDTH} units, Adam, learning rate {continual.LEARNING_RATE}, "
        f"batches of {continual.BATCH}; {_seeds(seeds)}.",
        "task",
        (
            Panel(continual.ACCURACY, "digits read right before they are learned from (%)", 100, (0, 100)),
            Panel(continual.SILENT, "hidden units silent for every digit (%)", 100, (0, 60)),
        ),
    )
    _write(
        console,
        folder,
        outcome,
        picture,
        {
            "seed": seed,
            "seeds": seeds,
            "tasks": tasks,
            "learning_rate": continual.LEARNING_RATE,
            "batch": continual.BATCH,
            "width": continual.WIDTH,
            "every": continual.RULE.every,
        },
    )
    _suggest(
        console,
        "biofx demo --tasks 300   what comes later (--digits: digits learned once)",
        'unit_turnover="redo"     in the config of a model of yours, as this page says:',
        "tools/docs/pages/howto/loss_of_plasticity.md   how to see it, what helps",
    )
    return outcome


def run_digits(*, seed: int = 0, seeds: int = 3, epochs: int = 12, folder: Path = DIGITS_FOLDER) -> Outcome:
    """Show that a rewritten network learns to read digits as a plain one does, width and step matched.

    Args:
        seed: as for :func:`run_demo`; it decides also which digits are held out.
        seeds: pairs of networks, with the numbers from ``seed`` on, a count >= 1.
        epochs: passes over the training set, a count >= 1.
        folder: as for :func:`run_demo`.

    Raises:
        InputError: as for :func:`run_demo`.
    """
    console = _begin(folder, seed=seed, seeds=seeds, epochs=epochs)
    _say(
        console,
        f"Handwritten digits: a plain residual network and one that biofx has rewritten learn to read them, "
        f"in {epochs} epochs; {digits.TEST_DIGITS} of 1797 are held out.",
    )
    with _progress(console, seeds * epochs, digits.ACCURACY) as after_epoch:
        outcome = digits.learn_digits(seed=seed, seeds=seeds, epochs=epochs, after_epoch=after_epoch)
    first, last = slice(1), slice(max(0, epochs - 3), epochs)
    _show_table(
        console,
        outcome,
        "held-out digits read right (%)",
        [
            (_numbers("epoch", first), digits.ACCURACY, first),
            (_numbers("epoch", last), digits.ACCURACY, last),
        ],
    )
    _say(
        console,
        "What was changed: two synapses for each connection, units that are excitatory or inhibitory, and a "
        f"learning rate for each synapse. Splits halve the width that acts and enlarge its steps, so the "
        f"rewritten network is {digits.WIDER} times as wide and takes 1/{digits.SMALLER_STEP} of the step.",
    )
    picture = Picture(
        "Split synapses, signed units and a rate for each synapse, beside a plain network",
        f"{digits.TEST_DIGITS} of 1797 handwritten digits held out. A residual network, SGD with momentum "
        f"{digits.MOMENTUM}, batches of {digits.BATCH};\nrewritten: {digits.WIDER} times the width, "
        f"1/{digits.SMALLER_STEP} of the learning rate of {digits.LEARNING_RATE}; {_seeds(seeds)}.",
        "epoch",
        (
            Panel(digits.ACCURACY, "held-out digits read right (%)", 100),
            Panel(digits.LOSS, "training loss (nats)", is_logarithmic=True),
        ),
    )
    _write(
        console,
        folder,
        outcome,
        picture,
        {
            "seed": seed,
            "seeds": seeds,
            "epochs": epochs,
            "learning_rate": {PLAIN: digits.LEARNING_RATE, BIO: digits.LEARNING_RATE / digits.SMALLER_STEP},
            "width": {PLAIN: digits.WIDTH, BIO: digits.WIDTH * digits.WIDER},
            "momentum": digits.MOMENTUM,
            "batch": digits.BATCH,
        },
    )
    _suggest(
        console,
        "biofx demo     learning that goes on, where a plain network fails",
        "biofx passes   every mechanism, and its options",
        "biofx transform biofx.demo:DigitNet --set weight_splitting_Gamma=2 --diff",
    )
    return outcome


def _begin(folder: Path, *, seed: int, **counts: int) -> Console:
    """Check what was asked for, and make the folder."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"expected {name} >= 1, found {name}={count}")
    if seed < 0:
        raise InputError(f"expected seed >= 0, found seed={seed}")
    require_extras()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error
    return Console()


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


@contextmanager
def _progress(console: Console, total: int, measure: str) -> Iterator[Callable[[Run], object]]:
    """Show a bar for each kind of network while it learns; yields what a run is given to after each task."""
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}  now {task.fields[now]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bars = {name: progress.add_task(label, total=total, now="-") for name, label in LABELS.items()}

        def advance(run: Run) -> None:
            progress.update(bars[run.name], advance=1, now=f"{run.measured[measure][-1]:.1%}")

        yield advance


def _show_table(
    console: Console, outcome: Outcome, title: str, columns: Sequence[tuple[str, str, slice]]
) -> None:
    """Show means over tasks or epochs of each kind of network, and how they differ, pair by pair."""
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    table.add_column("")
    for head, _, _ in columns:
        table.add_column(head, justify="right")
    means = {
        name: [outcome.curves(name, measure)[:, part].mean(1) for _, measure, part in columns]
        for name in LABELS
    }
    for name, label in LABELS.items():
        table.add_row(label, *map(with_error, means[name]))
    apart = [bio - plain for plain, bio in zip(means[PLAIN], means[BIO], strict=True)]
    table.add_row("difference", *(with_error(difference, signed=True) for difference in apart), style="bold")
    console.print(table)


def _headline(outcome: Outcome, first: slice, last: slice) -> str:
    """Return what the curves show, where it is beyond two standard errors; else only what they are."""
    curves = {name: outcome.curves(name, continual.ACCURACY) for name in LABELS}
    lost, error = mean_and_error(curves[PLAIN][:, first].mean(1) - curves[PLAIN][:, last].mean(1))
    lost_by_bio, _ = mean_and_error(curves[BIO][:, first].mean(1) - curves[BIO][:, last].mean(1))
    if lost > 2 * error and lost_by_bio < lost / 4:
        return "A plain network loses the ability to learn; the rewritten one keeps it"
    return "A plain network and a rewritten one learn task after task"


def _numbers(what: str, part: slice) -> str:
    first, last = part.start or 0, part.stop
    return f"{what} {last}" if last == first + 1 else f"{what}s {first + 1} to {last}"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"mean ± standard error of {count} seeds"


def _write(
    console: Console, folder: Path, outcome: Outcome, picture: Picture, settings: dict[str, Any]
) -> None:
    results = {"settings": settings, "runs": [vars(run) for run in outcome.runs]}
    picture.draw(outcome, LABELS, folder / "curves.png")
    outcome.report.to_html(folder / "report.html")
    write_whole(folder / "report.json", outcome.report.to_json() + "\n")
    write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    _say(console, f"Wrote curves.png, report.html, report.json and results.json to {folder}.")


def _suggest(console: Console, *lines: str) -> None:
    _say(console, "\nTry next")
    for line in lines:
        _say(console, f"  {line}")
