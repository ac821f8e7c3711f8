"""A rewritten graph, as reports draw it."""

from __future__ import annotations

from torch import nn

from biofx.config import BioConfig
from biofx.transform import transform
from docs.figures.figure import Drawn


def draw(long: bool) -> Drawn:
    """Draw the graph of a small network after three passes."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    _, report = transform(model, BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True))
    acted = [one.name for one in report.passes if any(remark.kind == "applied" for remark in one.remarks)]
    named = ", ".join(f"`{name}`" for name in acted)
    caption = f"""
        Three linear layers with ReLUs between them, rewritten with `weight_splitting_Gamma=2` and
        `apply_dales_principle=True`, as `report.to_svg()` draws it. The colours are
        those of the passes: {named}.
    """
    return Drawn(report.to_svg(), caption)
