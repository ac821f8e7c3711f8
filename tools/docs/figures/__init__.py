"""The figures of the site."""

from docs.staging import Stage


def draw_figures(stage: Stage, *, long: bool = False) -> None:
    """Draw them."""
