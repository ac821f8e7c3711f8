"""What splitting weights does to the connections of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from biofx.config import BioConfig
from biofx.operators.split_ops import fold_weight
from biofx.transform import transform
from docs.figures.figure import EXCITATORY, INHIBITORY, Drawn, canvas, panels, show_matrix, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAMMA, _INPUTS, _CHANNELS = 2, 4, 6


def draw(long: bool) -> Drawn:
    """Draw a layer's channels, the groups that they form, and the weight that comes of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(_INPUTS, _CHANNELS), nn.ReLU(), nn.Linear(_CHANNELS, 2))
    bio_model, _ = transform(model, BioConfig(weight_splitting_Gamma=_GAMMA))
    weight = bio_model.get_parameter("0.weight").detach()
    folded = fold_weight(weight, rows=_GAMMA)
    figure = canvas(9.5, 3.4)
    left, middle, right, last = panels(figure, 1, 4, width_ratios=[1.25, 1.25, 1, 1])
    _connect(left, weight, 1, f"a weight: {_CHANNELS} units")
    _connect(middle, weight, _GAMMA, f"Γ = {_GAMMA}: {_CHANNELS // _GAMMA} units, {_GAMMA} synapses each")
    limit = float(folded.abs().max())
    show_matrix(right, weight, "the parameter", "channels", "inputs", limit)
    for edge in range(_GAMMA, _CHANNELS, _GAMMA):
        right.axhline(edge - 0.5, color="black", linewidth=1)
    image = show_matrix(last, folded, "its fold: what acts", "units", "inputs", limit)
    figure.colorbar(image, ax=last, shrink=0.6, label="weight")
    caption = f"""
        Γ = {_GAMMA}: neighbouring output channels of a layer form groups, and each member carries the group's
        sum. So an input reaches a unit by {_GAMMA} synapses, which learn by themselves. Widths are
        magnitudes, red is positive. On the right the layer's parameter, and its fold, in which
        each group is one row.
    """
    return Drawn(svg_of(figure), caption)


def _connect(axes: Axes, weight: Tensor, gamma: int, title: str) -> None:
    """Draw the connections of a layer, from the inputs below to the units above."""
    units = len(weight) // gamma
    largest = float(weight.abs().max())
    across_inputs = torch.linspace(0, 1, weight.shape[1]).tolist()
    across_units = torch.linspace(0.0, 1.0, units).tolist()
    for channel, row in enumerate(weight.tolist()):
        unit, member = divmod(channel, gamma)
        bend = 0.0 if gamma == 1 else 0.045 * (2 * member - gamma + 1) / (gamma - 1)
        for place, value in enumerate(row):
            start, end = across_inputs[place], across_units[unit]
            axes.plot(
                [start, (start + end) / 2 + bend, end],
                [0, 0.5, 1],
                color=EXCITATORY if value > 0 else INHIBITORY,
                linewidth=0.4 + 3 * abs(value) / largest,
                alpha=0.8,
                zorder=1,
            )
    for places, height in ((across_inputs, 0), (across_units, 1)):
        axes.scatter(places, [height] * len(places), s=130, color="white", edgecolor="#333333", zorder=2)
    axes.set(title=title, xlim=(-0.12, 1.12), ylim=(-0.15, 1.15))
    axes.text(0.5, -0.13, "inputs", ha="center", va="top", fontsize=9, color="#555555")
    axes.set_axis_off()
