"""Pictures of a run: six panels of curves over the steps, or one row per layer."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from biofx.diagnostics.monitor_records import HISTOGRAM_EDGES, LayerRecord, StepRecord, short_name
from biofx.errors import InputError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Series = dict[str, list[tuple[int, LayerRecord]]]
"""For each weight's path its steps and records, steps rising."""

_MOST_NAMED = 10  # layers that a legend and distinct colours can tell apart
_MOST_TICKS = 26
_LONGEST_NAME = 30
_EXCITATORY, _INHIBITORY, _TURNOVER, _WRONG = "#d55e00", "#0072b2", "#009e73", "#c93c37"
_FEW_POINTS = 30  # below, points are marked: a curve of one point would be invisible


def plot_records(
    records: Sequence[StepRecord], crystallized_below: float, path: str | os.PathLike[str] | None
) -> Figure:
    """Return the picture of a run, and write it to ``path`` if there is one; see ``Monitor.plot``."""
    figure = _new_figure(records, figsize=(12, 6.5))
    colormaps = importlib.import_module("matplotlib").colormaps
    series = series_of(records)
    colors = _colors(list(series), colormaps)
    panels = figure.subplots(2, 3, sharex=True).flat
    _draw_factors(panels[0], series, colors)
    below = f"crystallized: factors < {crystallized_below:g} (%)"
    _draw_curves(panels[1], series, colors, below, lambda layer: _percent(layer.crystallized_fraction))
    _draw_replaced(panels[2], series, colors)
    _draw_curves(panels[3], series, colors, "E:I ratio (Σ excitatory / Σ |inhibitory|)", lambda r: r.ei_ratio)
    panels[3].axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    _draw_curves(panels[4], series, colors, "gradient norm (L2, loss / weight)", lambda r: r.gradient_norm)
    _draw_curves(panels[5], series, colors, "update norm (L2, weight)", lambda r: r.update_norm)
    for axes in panels[4:]:
        _use_log_scale(axes)
    for axes in panels:
        axes.grid(alpha=0.3)
    for axes in panels[3:]:
        axes.set_xlabel("optimizer step")
    _draw_key(figure, list(panels), colors)
    if path is not None:
        save_figure(figure, path)
    return figure


def _new_figure(records: Sequence[StepRecord], figsize: tuple[float, float]) -> Figure:
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
    totals: dict[int, int] = {}
    for points in series.values():
        total = 0
        for _, layer in points:
            total += layer.replaced
            totals[id(layer)] = total
    _draw_curves(axes, series, colors, "replaced synapses (cumulative count)", lambda r: totals[id(r)])
    axes.set_ylim(bottom=0)


def _draw_curves(
    axes: Any,
    series: Series,
    colors: dict[str, Any],
    label: str,
    value: Callable[[LayerRecord], float | None],
) -> None:
    axes.set_ylabel(label)
    drawn = False
    for path, points in series.items():
        known = [(step, found) for step, layer in points if (found := value(layer)) is not None]
        known = [(step, found) for step, found in known if math.isfinite(found)]
        if known:
            marker = "." if len(known) < _FEW_POINTS else None
            axes.plot(*zip(*known, strict=True), color=colors[path], marker=marker, linewidth=1.2)
            drawn = True
    if not drawn:
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color="0.5")
        axes.set_yticks([])


def _use_log_scale(axes: Any) -> None:
    if any(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log", nonpositive="mask")


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _draw_key(figure: Figure, panels: list[Any], colors: dict[str, Any]) -> None:
    """Say which colour is which layer: a legend, or for many layers a scale with some of them named."""
    names = [plain_text(short_name(path, _LONGEST_NAME)) for path in colors]
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


def plot_layers(records: Sequence[StepRecord], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw each layer as it was last recorded, layers from the input at the top to the output.

    Args:
        records: a monitor's records.
        path: also written to this file, in the format that its ending names.

    Returns:
        A ``matplotlib.figure.Figure`` with three panels: how the learning-rate factors spread (in % of a
        layer's factors, by their value); shares of excitation and inhibition in the effective weights (%),
        with the number of wrong signs where there are any; synapses replaced from the first record to the
        last (in % of the layer's connections that exist).

    Raises:
        InputError: matplotlib is missing, or nothing has been recorded.
        OptionError: the file cannot be written.
    """
    series = series_of(records)
    layers = [points[-1][1] for points in series.values()]
    names = [plain_text(short_name(layer, _LONGEST_NAME)) for layer in series]
    height = 1.6 + 0.24 * max(4, len(layers))
    figure = _new_figure(records, figsize=(12, min(height, 60.0)))
    rates, signs, turnover = figure.subplots(1, 3, sharey=True, width_ratios=(1.4, 1, 1))
    _draw_rates(figure, rates, layers)
    _draw_signs(signs, layers)
    _draw_turnover(turnover, [[layer for _, layer in points] for points in series.values()])
    rates.set_yticks(range(len(names)), names, fontsize="small")
    rates.set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(f"step {records[-1].step:,}", fontsize="medium")
    if path is not None:
        save_figure(figure, path)
    return figure


def _draw_rates(figure: Any, axes: Any, layers: Sequence[LayerRecord]) -> None:
    axes.set_xlabel("learning-rate factor (dimensionless)")
    bins = len(HISTOGRAM_EDGES) - 1
    rows = [
        [100 * count / sum(layer.factor_histogram) for count in layer.factor_histogram]
        if layer.factor_histogram
        else [0.0] * bins
        for layer in layers
    ]
    if not any(map(any, rows)):
        _say_nothing(axes)
        return
    extent = (HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1], len(rows) - 0.5, -0.5)
    drawn = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, extent=extent, interpolation="nearest")
    figure.colorbar(drawn, ax=axes, label="factors (%)", location="top", shrink=0.8, aspect=30)
    for place, layer in enumerate(layers):
        if layer.factor_mean is not None:
            axes.plot([layer.factor_mean], [place], "|", color="white", markersize=9, markeredgewidth=2)


def _draw_signs(axes: Any, layers: Sequence[LayerRecord]) -> None:
    axes.set_xlabel("excitation | inhibition (% of Σ|weight|)")
    for place, layer in enumerate(layers):
        total = layer.excitation + layer.inhibition
        if not total > 0:  # also where it is not known
            continue
        share = 100 * layer.excitation / total
        axes.barh(place, share, color=_EXCITATORY, height=0.75)
        axes.barh(place, 100 - share, left=share, color=_INHIBITORY, height=0.75)
        if layer.wrong_signs:
            axes.text(99, place, f"{layer.wrong_signs:,} wrong", color="white", ha="right", va="center",
                      fontsize="small", bbox={"facecolor": _WRONG, "pad": 1.5, "linewidth": 0})  # fmt: skip
    axes.axvline(50, color="white", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 100)


def _draw_turnover(axes: Any, rows: Sequence[Sequence[LayerRecord]]) -> None:
    axes.set_xlabel("synapses replaced (%)")
    shares = [100 * sum(layer.replaced for layer in row) / max(1, row[-1].existing) for row in rows]
    if not any(shares):
        _say_nothing(axes)
        return
    axes.barh(range(len(shares)), shares, color=_TURNOVER, height=0.75)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)


def _say_nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color="0.5")
    axes.set_xticks([])
