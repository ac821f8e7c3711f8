"""The monitor's table: the latest record of every layer, live in a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from biofx.diagnostics.monitor_records import LayerRecord, StepRecord, short_name

_SECONDS_BETWEEN = 0.25
_LINES_AROUND = 4  # title, heading, the cursor's line, and one for what is printed above
_FEWEST_ROWS = 4
_SHORTEST_NAME = 8
_GAP = 2


class LiveTable:
    """Shows the latest record of every layer in place while it is open; takes records as they are made."""

    def __init__(self, records: Sequence[StepRecord], crystallized_below: float, console: Console) -> None:
        self._below = crystallized_below
        self._console = console
        self._step: int | None = None
        self._latest: dict[str, LayerRecord] = {}
        self._replaced: dict[str, int] = {}
        self._shown_at = -math.inf
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
        title = "no step recorded yet" if self._step is None else f"step {self._step:,}"
        headings = ("factors", f"< {self._below:g}", "replaced", "wrong", "E:I", "gradient", "update")
        shown = self._shown_layers()
        rows = [self._cells(path) if path is not None else () for path in shown]
        widths = [
            max(map(cell_len, (heading, *(cells[place].plain for cells in rows if cells))))
            for place, heading in enumerate(headings)
        ]
        for_names = max(_SHORTEST_NAME, self._console.width - sum(widths) - _GAP * len(widths))
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, _GAP, 0, 0),
        )
        table.add_column("layer", no_wrap=True)
        for heading, width in zip(headings, widths, strict=True):
            table.add_column(heading, justify="right", no_wrap=True, min_width=width)
        for path, cells in zip(shown, rows, strict=True):
            name = (
                f"… {len(self._latest) - len(shown) + 1} more"
                if path is None
                else short_name(path, for_names)
            )
            table.add_row(Text(name, style="dim" if path is None else ""), *cells)
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

    def _cells(self, path: str) -> list[Text]:
        layer = self._latest[path]
        factors = _or_dash(layer.factor_mean, ".2f")
        if layer.factor_std is not None:
            factors += f"±{layer.factor_std:.2f}"
        return [
            Text(factors),
            Text(_or_dash(layer.crystallized_fraction, ".1%")),
            Text(_count(self._replaced[path])),
            Text(_or_dash(layer.wrong_signs, ",d"), style="bold red" if layer.wrong_signs else ""),
            Text(_or_dash(layer.ei_ratio, ".2f" if layer.ei_ratio < 100 else ".0e")),
            Text(_or_dash(layer.gradient_norm, ".1e")),
            Text(_or_dash(layer.update_norm, ".1e")),
        ]


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _count(value: int) -> str:
    return f"{value:,}" if value < 10**6 else f"{value / 10**6:.1f}M"
