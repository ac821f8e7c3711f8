"""The picture of a demo: a panel for each measure, seeds as bands of one standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from biofx.demo.curves import BIO, PLAIN, Outcome, mean_and_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {PLAIN: "#c8553d", BIO: "#00798c"}
_LEFT, _NEAREST = 0.06, 0.075


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    measure: str
    title: str
    """What is measured, with its unit."""
    scale: float = 1.0
    """What the measure is multiplied by: 100 for percent."""
    limits: tuple[float, float] | None = None
    """Of the vertical axis; None to follow the curves."""
    is_logarithmic: bool = False


@dataclass(frozen=True)
class Picture:
    """What a demo's picture shows."""

    title: str
    subtitle: str
    horizontal: str
    """What is counted along the horizontal axes."""
    panels: Sequence[Panel]
    """From left to right; the first is wider."""

    def draw(self, outcome: Outcome, labels: Mapping[str, str], path: Path) -> None:
        """Write it as PNG.

        Args:
            outcome: what the networks did.
            labels: what each kind of network is called beside its curve, by its name.
            path: of the file.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(11, 4.6))
        widths = [1.6, *[1.0] * (len(self.panels) - 1)]
        row = figure.subplots(1, len(self.panels), gridspec_kw={"width_ratios": widths}, squeeze=False)[0]
        for axes, panel in zip(row, self.panels, strict=True):
            _draw(axes, panel, outcome, labels)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel(self.horizontal, fontsize=10.5, color="#333333")
        figure.suptitle(self.title, x=_LEFT, y=0.97, ha="left", fontsize=15, fontweight="bold")
        figure.text(_LEFT, 0.855, self.subtitle, ha="left", fontsize=10.5, color="#555555")
        figure.subplots_adjust(left=_LEFT, right=0.9, top=0.75, bottom=0.13, wspace=0.45)
        figure.savefig(path, dpi=150)


def _draw(axes: Axes, panel: Panel, outcome: Outcome, labels: Mapping[str, str]) -> None:
    ends = {}
    for name in labels:
        mean, error = mean_and_error(panel.scale * outcome.curves(name, panel.measure))
        places = range(1, len(mean) + 1)
        axes.plot(places, mean, color=COLOURS[name], linewidth=2, marker="o" if len(mean) == 1 else None)
        axes.fill_between(places, mean - error, mean + error, color=COLOURS[name], alpha=0.22, linewidth=0)
        axes.set_xlim(1, max(2, len(mean)))
        ends[name] = mean[-5:].mean().item()
    if panel.is_logarithmic:
        axes.set_yscale("log")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    for name, height in _heights(axes, ends).items():
        axes.annotate(
            labels[name],
            (1, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            color=COLOURS[name],
            va="center",
            fontsize=11,
            fontweight="bold",
        )
    axes.set_title(panel.title, loc="left", fontsize=11, color="#333333")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _heights(axes: Axes, ends: Mapping[str, float]) -> dict[str, float]:
    """Return where labels stand, as fractions of the axes: at the ends of their curves, but not too close."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    heights = {name: float(to_fraction.transform((1.0, end))[1]) for name, end in ends.items()}
    lower, upper = sorted(heights, key=lambda name: heights[name])
    missing = max(0.0, _NEAREST - (heights[upper] - heights[lower])) / 2
    return {lower: heights[lower] - missing, upper: heights[upper] + missing}
