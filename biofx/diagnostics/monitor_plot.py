"""The picture of a run: panels of curves over the steps."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from biofx.diagnostics.monitor_records import LayerRecord, StepRecord, Thresholds, short_name
from biofx.diagnostics.unit_activity import UnitActivity
from biofx.errors import InputError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Series = dict[str, list[tuple[int, LayerRecord]]]
"""For each weight's path its steps and records, steps rising."""

_MOST_NAMED = 10  # layers that a legend and distinct colours can tell apart
_MOST_TICKS = 26
LONGEST_NAME = 30
_FEW_POINTS = 30  # below, points are marked: a curve of one point would be invisible


def plot_records(
    records: Sequence[StepRecord], thresholds: Thresholds, path: str | os.PathLike[str] | None
) -> Figure:
    """Return the picture of a run, and write it to ``path`` if there is one; see ``Monitor.plot``."""
    series = series_of(records)
    layers = [layer for points in series.values() for _, layer in points]
    further = [
        draw
        for draw, has_any in (
            (_draw_activity, any(layer.activity is not None for layer in layers)),
            (_draw_turned_over, any(layer.unit_age is not None for layer in layers)),
        )
        if has_any
    ]
    rows = 2 + len(further)
    figure = new_figure(records, figsize=(12, 3.25 * rows))
    colormaps = importlib.import_module("matplotlib").colormaps
    colors = _colors(list(series), colormaps)
    panels = list(figure.subplots(rows, 3, sharex=True).flat)
    _draw_factors(panels[0], series, colors)
    below = f"crystallized below {thresholds.crystallized_below:g} (% of factors)"
    _draw_curves(panels[1], series, colors, below, lambda layer: _percent(layer.crystallized_fraction))
    _draw_replaced(panels[2], series, colors)
    _draw_curves(panels[3], series, colors, "E:I ratio (Σ excitatory / Σ |inhibitory|)", lambda r: r.ei_ratio)
    panels[3].axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    _draw_curves(panels[4], series, colors, "gradient norm (L2, loss / weight)", lambda r: r.gradient_norm)
    _draw_curves(panels[5], series, colors, "update norm (L2, weight)", lambda r: r.update_norm)
    for axes in panels[4:6]:
        _use_log_scale(axes)
    for place, draw in enumerate(further):
        draw(panels[3 * place + 6 : 3 * place + 9], series, colors, thresholds)
    for axes in panels:
        axes.grid(alpha=0.3)
    for axes in panels[-3:]:
        axes.set_xlabel("optimizer step")
    _draw_key(figure, panels, colors)
    if path is not None:
        save_figure(figure, path)
    return figure


def new_figure(records: Sequence[StepRecord], figsize: tuple[float, float]) -> Figure:
    """Return an empty figure, or say what is missing for it: matplotlib, or records."""
    if not records:
        raise InputError(
            "expected something to plot, found no records; train with the monitor attached first"
        )
    try:
        figure: Figure = importlib.import_module("matplotlib.figure").Figure(
            figsize=figsize, layout="constrained"
        )
    except ImportError as error:
        raise InputError(f"plotting needs matplotlib: pip install 'biofx[demo]' ({error})") from error
    return figure


def series_of(records: Sequence[StepRecord]) -> Series:
    """Return each weight's records over the steps; where a run went back to a checkpoint, the later ones."""
    series: Series = {}
    for record in records:
        for path, layer in record.layers.items():
            points = series.setdefault(path, [])
            while points and points[-1][0] >= record.step:
                points.pop()
            points.append((record.step, layer))
    return series


def _colors(paths: list[str], colormaps: Any) -> dict[str, Any]:
    """Colour few layers distinctly, many by their place in the model."""
    if len(paths) <= _MOST_NAMED:
        return {path: colormaps["tab10"](place) for place, path in enumerate(paths)}
    return {path: colormaps["viridis"](0.9 * place / (len(paths) - 1)) for place, path in enumerate(paths)}


def _draw_factors(axes: Any, series: Series, colors: dict[str, Any]) -> None:
    _draw_curves(axes, series, colors, "learning-rate factor (mean ± std)", lambda layer: layer.factor_mean)
    alpha = 0.15 if len(series) <= 3 else 0.4 / len(series)
    for path, points in series.items():
        bands = [
            (step, layer.factor_mean - layer.factor_std, layer.factor_mean + layer.factor_std)
            for step, layer in points
            if layer.factor_mean is not None and layer.factor_std is not None
        ]
        if bands:
            axes.fill_between(*zip(*bands, strict=True), color=colors[path], alpha=alpha, linewidth=0)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))  # no factor is negative, if a band may be


def _draw_replaced(axes: Any, series: Series, colors: dict[str, Any]) -> None:
    totals = _totals(series, lambda layer: layer.replaced)
    _draw_curves(axes, series, colors, "replaced synapses (cumulative count)", lambda r: totals[id(r)])
    axes.set_ylim(bottom=0)


def _draw_activity(panels: list[Any], series: Series, colors: dict[str, Any], thresholds: Thresholds) -> None:
    """Draw which units are silent, the ranks of their activity, and the magnitude of weights."""
    silent = f"units ≤ {thresholds.dormancy:g} of their layer's mean (%)\ndashed: dead"
    _draw_pair(
        *(panels[0], series, colors, silent),
        _of_activity(lambda activity: 100 * activity.dormant_fraction),
        _of_activity(lambda activity: 100 * activity.dead_fraction),
    )
    _draw_pair(
        *(panels[1], series, colors, "effective rank of activity\ndashed: stable rank"),
        _of_activity(lambda activity: activity.effective_rank),
        _of_activity(lambda activity: activity.stable_rank),
    )
    for axes in panels[:2]:
        axes.set_ylim(bottom=0)
    _draw_curves(panels[2], series, colors, "mean |effective weight|", lambda layer: layer.weight_magnitude)


def _of_activity(value: Callable[[UnitActivity], float]) -> Callable[[LayerRecord], float | None]:
    return lambda layer: None if layer.activity is None else value(layer.activity)


def _draw_turned_over(
    panels: list[Any], series: Series, colors: dict[str, Any], thresholds: Thresholds
) -> None:
    """Draw the turnover of units: how many, how old they are, and what they contribute."""
    totals = _totals(series, lambda layer: layer.replaced_units)
    _draw_curves(
        *(panels[0], series, colors, "replaced units (cumulative count)"),
        lambda layer: None if layer.unit_age is None else totals[id(layer)],
    )
    _draw_curves(panels[1], series, colors, "mean age of units (runs of the rule)", lambda r: r.unit_age)
    label = "mean utility of units\ndashed: of synapses"
    _draw_pair(panels[2], series, colors, label, lambda r: r.unit_utility, lambda r: r.utility)
    _use_log_scale(panels[2])


def _draw_pair(
    axes: Any,
    series: Series,
    colors: dict[str, Any],
    label: str,
    value: Callable[[LayerRecord], float | None],
    dashed: Callable[[LayerRecord], float | None],
) -> None:
    _draw_curves(axes, series, colors, label, value)
    _plot_known(axes, series, colors, dashed, "--")


def _totals(series: Series, count: Callable[[LayerRecord], int]) -> dict[int, int]:
    """Return the running sums of a count, by the ids of records."""
    totals: dict[int, int] = {}
    for points in series.values():
        total = 0
        for _, layer in points:
            total += count(layer)
            totals[id(layer)] = total
    return totals


def _draw_curves(
    axes: Any,
    series: Series,
    colors: dict[str, Any],
    label: str,
    value: Callable[[LayerRecord], float | None],
) -> None:
    axes.set_ylabel(label)
    if not _plot_known(axes, series, colors, value):
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color="0.5")
        axes.set_yticks([])


def _plot_known(
    axes: Any,
    series: Series,
    colors: dict[str, Any],
    value: Callable[[LayerRecord], float | None],
    style: str = "-",
) -> bool:
    """Draw a curve of what is known for each layer; return whether there is any."""
    drawn = False
    for path, points in series.items():
        known = [(step, found) for step, layer in points if (found := value(layer)) is not None]
        known = [(step, found) for step, found in known if math.isfinite(found)]
        if known:
            marker = "." if len(known) < _FEW_POINTS else None
            axes.plot(*zip(*known, strict=True), style, color=colors[path], marker=marker, linewidth=1.2)
            drawn = True
    return drawn


def _use_log_scale(axes: Any) -> None:
    if any(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log", nonpositive="mask")


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _draw_key(figure: Figure, panels: list[Any], colors: dict[str, Any]) -> None:
    """Say which colour is which layer: a legend, or for many layers a scale with some of them named."""
    names = [plain_text(short_name(path, LONGEST_NAME)) for path in colors]
    if len(names) <= _MOST_NAMED:
        lines = importlib.import_module("matplotlib.lines")
        handles = [lines.Line2D([], [], color=color) for color in colors.values()]
        legend = figure.legend(
            handles, [str(place) for place in range(len(names))], loc="outside right upper"
        )
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)  # a label that begins with "_" would be left out
        return
    color_tools = importlib.import_module("matplotlib.colors")
    mappable = importlib.import_module("matplotlib.cm").ScalarMappable(
        color_tools.BoundaryNorm([place - 0.5 for place in range(len(names) + 1)], len(names)),
        color_tools.ListedColormap(list(colors.values())),
    )
    gaps = min(len(names), _MOST_TICKS) - 1
    ticks = [round(place * (len(names) - 1) / gaps) for place in range(gaps + 1)]
    bar = figure.colorbar(mappable, ax=panels, ticks=ticks, aspect=40, label="layer, input to output")
    bar.minorticks_off()
    bar.ax.set_yticklabels([names[place] for place in ticks], fontsize="small")
    bar.ax.invert_yaxis()


def plain_text(name: str) -> str:
    """Return a name that matplotlib reads no formula into."""
    return name.replace("$", r"\$")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture, in the format that the path's ending names.

    Raises:
        OptionError: it cannot be written.
    """
    try:
        figure.savefig(os.fspath(path), dpi=120)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write the picture to {os.fspath(path)!r}: {error}") from error
