"""The latest record of every layer as a table in the terminal, which follows the training."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from biofx.diagnostics.monitor_records import LayerRecord, StepRecord, short_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_SECONDS_BETWEEN = 0.25
_LINES_AROUND = 4  # title, heading, the cursor's line, and one for what is printed above
_FEWEST_ROWS = 4
_SHORTEST_NAME = 8
_GAP = 2
_HEADINGS = ("factors", "crystal.", "replaced", "wrong", "E:I", "gradient", "update")
_OF_ACTIVITY = ("dormant", "rank")
_LEFT_OUT_FIRST = ("gradient", "update", "wrong")
"""Columns for which there may be no room."""


class LiveTable:
    """Shows the latest record of every layer in place while it is open; takes records as they are made."""

    def __init__(self, records: Sequence[StepRecord], console: Console) -> None:
        self._console = console
        self._step: int | None = None
        self._latest: dict[str, LayerRecord] = {}
        self._replaced: dict[str, int] = {}
        self._shown_at = -math.inf
        from rich.live import Live

        self._live = Live(console=console, auto_refresh=False, get_renderable=self.table)
        for record in records:
            self._take(record)

    def __enter__(self) -> LiveTable:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def write(self, record: StepRecord) -> None:
        """Take a record and show it, unless the table was drawn a moment ago."""
        self._take(record)
        now = time.monotonic()
        if now - self._shown_at >= _SECONDS_BETWEEN:
            self._shown_at = now
            self._live.refresh()

    def flush(self) -> None:
        """Draw the table as it is now."""
        self._live.refresh()

    def table(self) -> Table:
        """Return the table, with as many layers as the console is high."""
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        title = "no step recorded yet" if self._step is None else f"step {self._step:,}"
        shown = self._shown_layers()
        rows = [self._cells(path) if path is not None else {} for path in shown]
        widths = {
            heading: max(map(cell_len, (heading, *(cells[heading].plain for cells in rows if cells))))
            for heading in self._headings()
        }
        for heading in _LEFT_OUT_FIRST:
            if self._left_for_names(widths) < _SHORTEST_NAME:
                widths.pop(heading, None)
        for_names = max(_SHORTEST_NAME, self._left_for_names(widths))
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, _GAP, 0, 0),
        )
        table.add_column("layer", no_wrap=True)
        for heading, width in widths.items():
            table.add_column(heading, justify="right", no_wrap=True, min_width=width)
        for path, cells in zip(shown, rows, strict=True):
            name = (
                f"… {len(self._latest) - len(shown) + 1} more"
                if path is None
                else short_name(path, for_names)
            )
            table.add_row(
                Text(name, style="dim" if path is None else ""),
                *(cells[heading] for heading in widths if cells),
            )
        return table

    def _shown_layers(self) -> list[str | None]:
        """Return the first and the last layers that fit, None for what is left out between them."""
        paths: list[str | None] = list(self._latest)
        room = max(_FEWEST_ROWS, self._console.height - _LINES_AROUND)
        if len(paths) <= room:
            return paths
        head, tail = room // 2, room - room // 2 - 1
        return [*paths[:head], None, *paths[-tail:]]

    def _take(self, record: StepRecord) -> None:
        self._step = record.step
        for path, layer in record.layers.items():
            self._latest[path] = layer
            self._replaced[path] = self._replaced.get(path, 0) + layer.replaced

    def _headings(self) -> list[str]:
        """Return the columns: those about activity only where a layer's activity was seen."""
        seen = any(layer.activity is not None for layer in self._latest.values())
        return [*_HEADINGS, *(_OF_ACTIVITY if seen else ())]

    def _left_for_names(self, widths: dict[str, int]) -> int:
        return self._console.width - sum(widths.values()) - _GAP * len(widths)

    def _cells(self, path: str) -> dict[str, Text]:
        from rich.text import Text

        layer = self._latest[path]
        activity = layer.activity
        factors = _or_dash(layer.factor_mean, ".2f")
        if layer.factor_std is not None:
            factors += f"±{layer.factor_std:.2f}"
        wrong = "bold red" if layer.wrong_signs else ""
        cells = [
            Text(factors),
            Text(_or_dash(layer.crystallized_fraction, ".1%")),
            Text(_shortened(self._replaced[path])),
            Text(_or_dash(layer.wrong_signs, ",d"), style=wrong),
            Text(_or_dash(layer.ei_ratio, ".2f" if layer.ei_ratio < 100 else ".0e")),
            Text(_or_dash(layer.gradient_norm, ".1e")),
            Text(_or_dash(layer.update_norm, ".1e")),
            Text(_or_dash(None if activity is None else activity.dormant_fraction, ".1%")),
            Text(_or_dash(None if activity is None else activity.effective_rank, ".1f")),
        ]
        return dict(zip((*_HEADINGS, *_OF_ACTIVITY), cells, strict=True))


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _shortened(value: int) -> str:
    return f"{value:,}" if value < 10**6 else f"{value / 10**6:.1f}M"
