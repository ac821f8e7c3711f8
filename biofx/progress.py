"""How far long work has come, for whoever shows it.

What works says so with :func:`advance`; where nobody listens, that costs next to nothing. The command line
listens with :func:`shown`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

Listener: TypeAlias = Callable[[str, int | None], object]
"""Called with what is being done and, where it is known, how many steps it has in all, once a step."""

_listener: ContextVar[Listener | None] = ContextVar("biofx_progress", default=None)


def advance(stage: str, total: int | None = None) -> None:
    """Say that one more step of a stage is done.

    Args:
        stage: what is being done, e.g. ``"capture"``; a new text begins a new stage.
        total: how many steps the stage has, a count; None where that is not known.
    """
    listener = _listener.get()
    if listener is not None:
        listener(stage, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a listener hear of every step that is made within."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def shown(console: Console | None = None) -> Iterator[None]:
    """Show a bar for each stage while it runs, and nothing afterwards; nothing at all outside a terminal.

    Args:
        console: where to show it, by default standard error, so that what is printed stays clean.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = console or Console(stderr=True)
    if not console.is_interactive:
        yield
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}{task.fields[of]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        stages: dict[str, TaskID] = {}

        def step(stage: str, total: int | None) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total, of="" if total is None else f"/{total}")
            progress.advance(stages[stage])

        with listening(step):
            yield
