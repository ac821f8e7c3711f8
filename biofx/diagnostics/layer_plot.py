"""The picture of a model at a step: one row per layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from biofx.diagnostics.monitor_plot import LONGEST_NAME, new_figure, plain_text, save_figure, series_of
from biofx.diagnostics.monitor_records import HISTOGRAM_EDGES, LayerRecord, StepRecord, short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXCITATORY, _INHIBITORY, _TURNOVER, _WRONG = "#d55e00", "#0072b2", "#009e73", "#c93c37"
_DORMANT, _DEAD = "0.75", "0.3"


def plot_layers(records: Sequence[StepRecord], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw each layer as it was last recorded, layers from the input at the top to the output.

    Args:
        records: a monitor's records.
        path: also written to this file, in the format that its ending names.

    Returns:
        A ``matplotlib.figure.Figure`` with three panels, and two more where the activity of units was seen:
        how the learning-rate factors spread (in % of a layer's factors, by their value); shares of excitation
        and inhibition in the effective weights (%), with the number of wrong signs where there are any;
        synapses replaced from the first record to the last (in % of the layer's connections that exist);
        dormant units, and the dead ones, which are some of them (in % of the layer's units); units replaced
        from the first record to the last (likewise; above 100 where most went more than once).

    Raises:
        InputError: matplotlib is missing, or nothing has been recorded.
        OptionError: the file cannot be written.
    """
    series = series_of(records)
    layers = [points[-1][1] for points in series.values()]
    names = [plain_text(short_name(layer, LONGEST_NAME)) for layer in series]
    height = 1.6 + 0.24 * max(4, len(layers))
    has_units = any(layer.activity is not None for layer in layers)
    widths = (1.4, 1, 1, 1, 1) if has_units else (1.4, 1, 1)
    figure = new_figure(records, figsize=(3.5 * sum(widths), min(height, 60.0)))
    rates, signs, turnover, *units = figure.subplots(1, len(widths), sharey=True, width_ratios=widths)
    _draw_rates(figure, rates, layers)
    _draw_signs(signs, layers)
    rows = [[layer for _, layer in points] for points in series.values()]
    _draw_turnover(turnover, "synapses replaced (%)", [_replaced_synapses(row) for row in rows])
    if units:
        _draw_silent(units[0], layers)
        _draw_turnover(units[1], "units replaced (%)", [_replaced_units(row) for row in rows])
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


def _draw_silent(axes: Any, layers: Sequence[LayerRecord]) -> None:
    axes.set_xlabel("dormant units (%), dark: dead")
    for place, layer in enumerate(layers):
        if layer.activity is not None:
            axes.barh(place, 100 * layer.activity.dormant_fraction, color=_DORMANT, height=0.75)
            axes.barh(place, 100 * layer.activity.dead_fraction, color=_DEAD, height=0.75)
    axes.set_xlim(0, 100)
    axes.grid(axis="x", alpha=0.3)


def _replaced_synapses(row: Sequence[LayerRecord]) -> float:
    return 100 * sum(layer.replaced for layer in row) / max(1, row[-1].existing)


def _replaced_units(row: Sequence[LayerRecord]) -> float:
    activity = row[-1].activity
    return 0.0 if activity is None else 100 * sum(layer.replaced_units for layer in row) / activity.units


def _draw_turnover(axes: Any, label: str, shares: Sequence[float]) -> None:
    axes.set_xlabel(label)
    if not any(shares):
        _say_nothing(axes)
        return
    axes.barh(range(len(shares)), shares, color=_TURNOVER, height=0.75)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)


def _say_nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color="0.5")
    axes.set_xticks([])
