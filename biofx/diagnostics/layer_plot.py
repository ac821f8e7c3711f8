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
    names = [plain_text(short_name(layer, LONGEST_NAME)) for layer in series]
    height = 1.6 + 0.24 * max(4, len(layers))
    figure = new_figure(records, figsize=(12, min(height, 60.0)))
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
