"""The figures of the site, each drawn by code when the site is built, from real models and runs."""

from __future__ import annotations

import matplotlib

from docs.figures import distributions, graphs, learning, splitting, weights
from docs.figures.figure import STYLE, Illustration
from docs.staging import Stage

__all__ = ["FIGURES", "draw_figures"]

FIGURES = (
    Illustration("distributions", distributions.draw),
    Illustration("rewritten_graph", graphs.draw),
    Illustration("splitting", splitting.draw),
    Illustration("signs", weights.draw_signs),
    Illustration("mask", weights.draw_mask),
    Illustration("loss_of_plasticity", learning.draw),
)


def draw_figures(stage: Stage, *, long: bool = False, keep: bool = False) -> None:
    """Write the pictures and their captions.

    Args:
        stage: where to.
        long: whether runs may take minutes.
        keep: whether pictures that an earlier build left there stay as they are.
    """
    for figure in FIGURES:
        if not (keep and stage.keep_figure(figure.name)):
            with matplotlib.rc_context(STYLE):
                drawn = figure.draw(long)
            stage.add_figure(figure.name, drawn.svg, drawn.caption)
