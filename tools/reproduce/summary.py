"""From runs to a table: means and standard errors over the seeds, which pair the arms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from reproduce.experiment import Claim, Experiment
from reproduce.runs import Result


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, which takes two values; None for one."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), error


def with_error(values: Sequence[float], digits: int = 2) -> str:
    """Return mean and standard error of the mean as text; of one value the mean alone."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" if error is None else f"{mean:.{digits}f} ± {error:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """An arm of a case at one learning rate, with a run for each seed."""

    case: str
    arm: str
    rate: float
    chosen: bool
    """Whether the rate was chosen; else it is the published one."""
    runs: tuple[Result, ...]
    """In the order of the seeds."""
    control: Row | None = None

    def values(self, measure: str) -> list[float]:
        """Return a measure's figures by seed."""
        return [run.found.figures[measure] for run in self.runs]

    def differences(self, measure: str) -> list[float] | None:
        """Return the arm's figures minus the control's, by seed; None without a control."""
        if self.control is None:
            return None
        pairs = zip(self.values(measure), self.control.values(measure), strict=True)
        return [own - other for own, other in pairs]


def rows(experiment: Experiment, results: Sequence[Result]) -> list[Row]:
    """Return for each case and arm a row at the published rate, and one at the rate chosen for it.

    A rate is chosen for each arm by the mean of the experiment's validation figure over the seeds; of equals
    the lower one. Where the published rate alone was run, none is chosen. A control's rate is found in the
    same way.
    """
    grouped: dict[tuple[str, str], dict[float, list[Result]]] = {}
    for result in results:
        rates = grouped.setdefault((result.job.case, result.job.arm), {})
        rates.setdefault(result.job.rate, []).append(result)
    made: dict[tuple[str, str, bool], Row] = {}
    # those that are compared with come first
    for case, arm in sorted(grouped, key=lambda key: experiment.arms[key[1]].control is not None):
        rates, control = grouped[case, arm], experiment.arms[arm].control or ""
        fixed = experiment.cases[case].fixed
        for chosen in (False, True):
            rate = _best(experiment, rates) if chosen else fixed if fixed in rates else None
            if rate is None or (chosen and len(rates) == 1 and fixed in rates):
                continue
            runs = tuple(sorted(rates[rate], key=lambda run: run.job.seed))
            made[case, arm, chosen] = Row(case, arm, rate, chosen, runs, made.get((case, control, chosen)))
    cases, arms = list(experiment.cases), list(experiment.arms)
    return sorted(made.values(), key=lambda row: (cases.index(row.case), row.chosen, arms.index(row.arm)))


def _best(experiment: Experiment, rates: dict[float, list[Result]]) -> float:
    sign = -1 if experiment.validation_lower_is_better else 1

    def merit(rate: float) -> float:
        mean = statistics.mean(run.found.figures[experiment.validation] for run in rates[rate])
        return sign * mean if math.isfinite(mean) else -math.inf

    return max(sorted(rates), key=merit)


def _cells(experiment: Experiment, row: Row) -> list[str]:
    measures = experiment.measures.items()
    name, first = next(iter(measures))
    differences = row.differences(name)
    figures = [with_error(row.values(key), measure.digits) for key, measure in measures]
    minus = "" if differences is None else with_error(differences, first.digits)
    return [row.case, row.arm, f"{row.rate:g}{' (chosen)' if row.chosen else ''}", *figures, minus]


def _headings(experiment: Experiment) -> list[str]:
    labels = [measure.label for measure in experiment.measures.values()]
    return ["case", "arm", "learning rate", *labels, "minus control"]


def table_of(experiment: Experiment, found: Sequence[Row], title: str) -> Table:
    """Return the rows for ``rich.print``."""
    table = Table(title=title, title_justify="left", box=None)
    for place, heading in enumerate(_headings(experiment)):
        table.add_column(heading, justify="left" if place < 2 else "right", no_wrap=place < 2)
    for row in found:
        table.add_row(*_cells(experiment, row))
    return table


def to_markdown(experiment: Experiment, found: Sequence[Row], title: str) -> str:
    """Return the rows in Markdown, with what was published and what was to be shown."""
    headings = _headings(experiment)
    lines = [f"# {experiment.name}", "", f"{title}. Source: {experiment.source}.", ""]
    lines += [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    lines += [f"| {' | '.join(_cells(experiment, row))} |" for row in found]
    lines += ["", *_described(experiment, found)]
    if experiment.published:
        lines += ["", "| published | figure |", "|---|---|"]
        lines += [f"| {entry.what} | {entry.figure} |" for entry in experiment.published]
    if experiment.claims:
        lines += ["", "| to be shown, at full length | found | shown |", "|---|---|---|"]
        for entry in verdicts(experiment, found):
            value = "not run" if entry["found"] is None else f"{entry['found']:.3g}"
            lines.append(f"| {entry['claim']} | {value} | {'yes' if entry['shown'] else 'no'} |")
    return "\n".join(lines) + "\n"


def _described(experiment: Experiment, found: Sequence[Row]) -> list[str]:
    """Return a line on each arm: what it is, and what it is compared with if that is not plain."""
    lines = []
    for name in dict.fromkeys(row.arm for row in found):
        arm = experiment.arms[name]
        control = f"compared with {arm.control}" if arm.control not in (None, "plain") else ""
        if told := "; ".join(filter(None, (control, arm.about))):
            lines.append(f"- {name}: {told}")
    return lines


def verdicts(experiment: Experiment, found: Sequence[Row]) -> list[dict[str, Any]]:
    """Return for each claim what was found, None where its arms were not run, and whether that shows it."""
    fixed = {(row.case, row.arm): row for row in found if not row.chosen}

    def figure(case: str, arm: str, measure: str) -> float:
        return statistics.mean(fixed[case, arm].values(measure))

    def judged(claim: Claim) -> dict[str, Any]:
        try:
            value = claim.value(figure)
        except KeyError:
            return {"claim": claim.text, "found": None, "shown": False}
        return {"claim": claim.text, "found": value, "shown": claim.low <= value <= claim.high}

    return [judged(claim) for claim in experiment.claims]
