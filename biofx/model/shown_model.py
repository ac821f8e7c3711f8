"""How a notebook draws a model. The picture is made by what lies above models, which says so on import."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

Drawer = Callable[[GraphModule], str | None]
_DRAWERS: list[Drawer] = []


def draw_models_with(drawer: Drawer) -> None:
    """Let a function draw models: it returns SVG, or None for a model that is too large."""
    _DRAWERS[:] = [drawer]


def drawn(model: GraphModule) -> str | None:
    """Return the picture of a model, None if there is none."""
    return _DRAWERS[0](model) if _DRAWERS else None
