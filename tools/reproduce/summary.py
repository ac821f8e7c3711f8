"""From runs to a table and a picture: means and standard errors over the seeds, which pair the arms."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from reproduce.arms import MECHANISMS
from reproduce.runs import Result


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, which takes two values; None for one."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), error


def with_error(values: Sequence[float]) -> str:
    """Return mean and standard error of the mean as text; of one value the mean alone."""
    mean, error = mean_and_error(values)
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"


@dataclass(frozen=True)
class Row:
    """An arm of a network at the learning rate that was best on validation images."""

    network: str
    arm: str
    rate: float
    parameters: int
    test: tuple[float, ...]
    """Test accuracy by seed, in percent."""


@dataclass(frozen=True)
class Contrast:
    """A mechanism minus its control, each at its own learning rate."""

    network: str
    mechanism: str
    arm: Row
    control: Row

    @property
    def differences(self) -> tuple[float, ...]:
        """Test accuracy of the arm minus the control's, by seed, in percent."""
        return tuple(own - other for own, other in zip(self.arm.test, self.control.test, strict=True))


def rows(results: Iterable[Result]) -> dict[tuple[str, str], Row]:
    """Choose each arm's learning rate, the lower one of equals; keys are network and arm."""
    grouped: dict[tuple[str, str], dict[float, list[Result]]] = {}
    for result in results:
        rates = grouped.setdefault((result.job.network, result.job.arm), {})
        rates.setdefault(result.job.rate, []).append(result)
    chosen = {}
    for (network, arm), rates in grouped.items():
        best = max(sorted(rates), key=lambda rate: statistics.mean(run.validation for run in rates[rate]))
        runs = sorted(rates[best], key=lambda run: run.job.seed)
        test = tuple(run.test for run in runs)
        chosen[network, arm] = Row(network, arm, best, runs[0].parameters, test)
    return chosen


def contrasts(chosen: dict[tuple[str, str], Row], mechanisms: Iterable[str]) -> list[Contrast]:
    """Return mechanism minus control, for each network."""
    networks = dict.fromkeys(network for network, _ in chosen)
    return [
        Contrast(
            network,
            name,
            chosen[network, MECHANISMS[name].arm],
            chosen[network, MECHANISMS[name].control],
        )
        for network in networks
        for name in mechanisms
    ]


def table_of(found: Sequence[Contrast], title: str) -> Table:
    """Return the contrasts for ``rich.print``, no wider than 80 columns."""
    table = Table(title=title, title_justify="left", box=None)
    for column in ("mechanism", "arm", "rate", "test accuracy [%]", "minus control"):
        table.add_column(column, justify="left" if column in ("mechanism", "arm") else "right", no_wrap=True)
    networks = dict.fromkeys(contrast.network for contrast in found)
    for network in networks:
        table.add_row(f"[bold]{network}[/]")
        for contrast in (contrast for contrast in found if contrast.network == network):
            arm, control, difference = contrast.arm, contrast.control, with_error(contrast.differences)
            table.add_row(contrast.mechanism, arm.arm, f"{arm.rate:g}", with_error(arm.test), difference)
            table.add_row("", control.arm, f"{control.rate:g}", with_error(control.test), "")
    return table


def to_markdown(found: Sequence[Contrast]) -> str:
    """Return the contrasts as a table in Markdown."""
    lines = [
        "| network | mechanism | learning rate | test accuracy [%] "
        "| control | learning rate | test accuracy [%] | difference |",
        "|---" * 8 + "|",
    ]
    for contrast in found:
        arm, control = contrast.arm, contrast.control
        cells = [contrast.network, contrast.mechanism, f"{arm.rate:g}", with_error(arm.test), control.arm]
        cells += [f"{control.rate:g}", with_error(control.test), with_error(contrast.differences)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: Sequence[Contrast], path: Path) -> None:
    """Draw accuracies and differences with standard errors, a row of panels per network."""
    networks = list(dict.fromkeys(contrast.network for contrast in found))
    figure = Figure(figsize=(10, 0.6 + 2.8 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), 2, squeeze=False, sharey="row")
    for network, (left, right) in zip(networks, panels, strict=True):
        own = [contrast for contrast in found if contrast.network == network]
        for place, contrast in enumerate(own):
            styles = ((contrast.arm, -0.12, "o", "#d55e00"), (contrast.control, 0.12, "s", "#0072b2"))
            for row, shift, marker, color in styles:
                mean, error = mean_and_error(row.test)
                left.errorbar(mean, place + shift, xerr=error, fmt=marker, color=color, capsize=3)
            mean, error = mean_and_error(contrast.differences)
            right.errorbar(mean, place, xerr=error, fmt="o", color="0.2", capsize=3)
        left.set_yticks(range(len(own)), [contrast.mechanism for contrast in own])
        left.set_ylim(len(own) - 0.5, -0.5)
        left.set(title=f"{network}: mechanism (circles), control (squares)", xlabel="test accuracy (%)")
        right.set(title="mechanism minus control, paired by seed", xlabel="difference (percentage points)")
        right.axvline(0, color="0.6", linewidth=0.8)
        for axes in (left, right):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
