"""What a figure is, and how all of them look."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from biofx.demo.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN, BIO = COLOURS["plain"], COLOURS["bio"]
EXCITATORY, INHIBITORY = "#c8553d", "#2f5d8a"
SIGNED = "RdBu_r"
"""The map of colours for weights: red is positive, excitatory."""
STYLE: Any = {
    "svg.hashsalt": "biofx",  # else the file differs from run to run
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlepad": 6,
    "axes.edgecolor": "#999999",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}
"""Settings of matplotlib under which all are drawn."""


@dataclass(frozen=True)
class Drawn:
    """A picture and what is said of it."""

    svg: str
    caption: str
    """One or two sentences in plain text, with the numbers that the picture was made from."""


@dataclass(frozen=True)
class Illustration:
    """One figure of the site."""

    name: str
    """What a page calls it: ``<!-- figure: NAME -->``."""
    draw: Callable[[bool], Drawn]
    """From whether the runs it shows may be long."""


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(figure: Figure, rows: int, columns: int, **options: Any) -> list[Axes]:
    """Return axes in rows and columns, one after another."""
    return list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def svg_of(figure: Figure) -> str:
    """Return a figure as SVG, the same text for the same figure."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def show_matrix(axes: Axes, values: Any, title: str, rows: str, columns: str, limit: float) -> Any:
    """Show a weight as a matrix of colours between -limit and limit, and return the image."""
    image = axes.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="equal", interpolation="nearest")
    axes.set(title=title, xlabel=columns, ylabel=rows, xticks=[], yticks=[])
    return image
