"""Pictures of an experiment: curves with bands of the standard error, or figures with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from reproduce.experiment import Experiment
from reproduce.summary import Row, mean_and_error


def plot(experiment: Experiment, found: Sequence[Row], path: Path) -> None:
    """Draw a row of panels per case: its curves, or without curves figures and differences."""
    cases = list(dict.fromkeys(row.case for row in found))
    columns = len(experiment.curves) or 2
    figure = Figure(figsize=(5 * columns, 0.6 + 3.2 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), columns, squeeze=False)
    for case, places in zip(cases, panels, strict=True):
        own = [row for row in found if row.case == case]
        # one row an arm: at the published rate where there is one
        shown = [row for row in own if row.chosen == own[0].chosen]
        if experiment.curves:
            _draw_curves(experiment, shown, places)
        else:
            _draw_figures(experiment, shown, places)
        places[0].set_title(case, loc="left")
    figure.savefig(path, dpi=120)


def _draw_curves(experiment: Experiment, shown: Sequence[Row], places: Any) -> None:
    for axes, (name, label) in zip(places, experiment.curves.items(), strict=True):
        for place, row in enumerate(shown):
            curves = np.array([run.found.curves[name] for run in row.runs])
            at, mean = row.runs[0].found.at, curves.mean(0)
            color = colormaps["tab10"](place % 10)
            marker = "o" if len(at) == 1 else None  # a curve of one point would be invisible
            label_of_arm = f"{row.arm} at {row.rate:g}"
            axes.plot(at, mean, color=color, label=label_of_arm, linewidth=1.2, marker=marker)
            if len(curves) > 1:
                error = curves.std(0, ddof=1) / len(curves) ** 0.5
                axes.fill_between(at, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel=experiment.time, ylabel=label)
        axes.grid(alpha=0.3)
    places[0].legend(fontsize="x-small")


def _draw_figures(experiment: Experiment, shown: Sequence[Row], places: Any) -> None:
    name, measure = next(iter(experiment.measures.items()))
    left, right = places
    for place, row in enumerate(shown):
        mean, error = mean_and_error(row.values(name))
        left.errorbar(mean, place, xerr=error, fmt="o", color="#0072b2", capsize=3)
        differences = row.differences(name)
        if differences is not None:
            mean, error = mean_and_error(differences)
            right.errorbar(mean, place, xerr=error, fmt="o", color="0.2", capsize=3)
    for axes in places:
        axes.set_yticks(range(len(shown)), [row.arm for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(alpha=0.3)
    left.set(xlabel=measure.label)
    right.set(xlabel=f"{measure.label}: minus control, paired by seed")
    right.axvline(0, color="0.6", linewidth=0.8)
