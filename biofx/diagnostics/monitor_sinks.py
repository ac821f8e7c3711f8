"""Where a monitor's records go: a file of JSON lines, TensorBoard, a table in the terminal.

A file of JSON lines begins with an object about the run; a reader should check its ``schema``:

``schema``
    ``"biofx.run/1"``; the number goes up when a key changes its meaning or disappears.
``crystallized_below``
    The factor below which ``crystallized`` counts, dimensionless.
``histogram_edges``
    The edges of ``factor_histogram``; its first and last bin also hold what lies beyond them.

Each further line is one recorded step: an object with ``step`` (from 0) and ``layers``, which has for each
weight's path an object with the fields of :class:`biofx.diagnostics.LayerRecord`: null is what a layer
does not have, and the texts ``"nan"``, ``"inf"`` and ``"-inf"`` are what JSON has no numbers for. Several
optimizers on one model write a line each, with their own weights. A run that went on from a checkpoint
repeats the steps since; the later line of a step counts.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from biofx.diagnostics.monitor_records import HISTOGRAM_EDGES, LayerRecord, StepRecord, short_name
from biofx.errors import InputError, OptionError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

SCHEMA = "biofx.run/1"
_NUMBERS = ("excitation", "inhibition")
_OPTIONAL_NUMBERS = ("factor_mean", "factor_std", "gradient_norm", "update_norm")
_OPTIONAL_COUNTS = ("crystallized", "wrong_signs", "wrong_signs_raw")
_ADDED = ("connections",)
"""Counts that files of older versions lack."""


class JsonLines:
    """Writes records to a file, each at once and whole, so that a crash costs at most the line at hand.

    Raises:
        OptionError: the file holds something already and ``append`` is not set, is of another kind, or
            cannot be used.
    """

    def __init__(self, path: Path, crystallized_below: float, *, append: bool) -> None:
        self._path = path.absolute()
        self._header = {
            "schema": SCHEMA,
            "crystallized_below": crystallized_below,
            "histogram_edges": HISTOGRAM_EDGES,
        }
        self._ready = False
        content = _content(self._path) if self._path.exists() else b""
        if content and not append:
            raise OptionError(
                f"expected a new or empty file, found {self._path} with {len(content)} bytes; continue it "
                "(append=True), name another one, or remove it"
            )
        if content:
            found, _ = read_json_lines(self._path)
            if found != crystallized_below:
                raise OptionError(
                    f"expected {self._path} to have crystallized_below={crystallized_below}, found {found}; "
                    "use the same threshold, or name another file"
                )

    def write(self, record: StepRecord) -> None:
        """Append one line, after what has to stand before it."""
        lines = [_line(_to_plain(record))]
        try:
            if not self._ready and self._is_new_after_mending():
                lines.insert(0, _line(self._header))
            with open(self._path, "ab") as file:
                file.write(b"".join(lines))
        except OSError as error:
            raise OptionError(f"cannot write {self._path}: {error}") from error
        self._ready = True

    def flush(self) -> None:
        """Do nothing: every line is in the file as soon as it is written."""

    def _is_new_after_mending(self) -> bool:
        """Cut off a half line that an earlier run has left; return whether the file is empty then."""
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with open(self._path, "r+b") as file:
                file.truncate(whole)
        return whole == 0


def read_json_lines(path: Path) -> tuple[float, list[StepRecord]]:
    """Return the threshold for crystallized factors and the records of a file.

    Raises:
        OptionError: the file cannot be read, is of another kind or version, or a line is no record; but a
            last line without its end is left out.
    """
    whole_lines = _content(path).split(b"\n")[:-1]  # what follows the last line end was never finished
    parsed = _parsed(path, whole_lines)
    header = next(parsed, None)
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        found = header.get("schema") if isinstance(header, dict) else header
        raise OptionError(f"{path}: expected the records of a monitor, {SCHEMA!r}, found {found!r}")
    threshold = header.get("crystallized_below")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise OptionError(f"{path}, line 1: expected a number as crystallized_below, found {threshold!r}")
    records = []
    for number, entry in enumerate(parsed, 2):
        try:
            records.append(_from_plain(entry))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise OptionError(f"{path}, line {number}: expected a recorded step: {reason}") from error
    return float(threshold), records


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error}") from error


def _parsed(path: Path, lines: list[bytes]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{path}, line {number}: expected JSON: {error}") from error


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _to_plain(record: StepRecord) -> dict[str, Any]:
    layers = {
        path: {name: _spelled(value) for name, value in vars(layer).items()}
        for path, layer in record.layers.items()
    }
    return {"step": record.step, "layers": layers}


def _from_plain(entry: Any) -> StepRecord:
    layers = {str(path): _layer_from_plain(fields) for path, fields in entry["layers"].items()}
    return StepRecord(_count(entry["step"]), layers)


def _layer_from_plain(fields: Mapping[str, Any]) -> LayerRecord:
    others: dict[str, Any] = {name: _number(fields[name]) for name in _NUMBERS}
    for names, convert in ((_OPTIONAL_NUMBERS, _number), (_OPTIONAL_COUNTS, _count)):
        others |= {name: None if fields[name] is None else convert(fields[name]) for name in names}
    others |= {name: _count(fields[name]) for name in _ADDED if fields.get(name) is not None}
    return LayerRecord(
        synapses=_count(fields["synapses"]),
        factor_histogram=tuple(map(_count, fields["factor_histogram"])),
        touched={str(rule): _count(count) for rule, count in fields["touched"].items()},
        **others,
    )


def _spelled(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    if value in ("nan", "inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return float(value)
    raise ValueError(f"found {value!r} where a number belongs")


def _count(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"found {value!r} where a count belongs")


class TensorBoard:
    """Writes each quantity of each layer as a curve, and the factors as a histogram.

    Raises:
        InputError: the package ``tensorboard`` is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise InputError(
                f"Monitor(tensorboard=...) needs the package tensorboard: pip install tensorboard ({error})"
            ) from error
        self._writer: Any = module.SummaryWriter(log_dir=str(folder))

    def write(self, record: StepRecord) -> None:
        """Add one point to each curve; what a layer does not have gets none."""
        for path, layer in record.layers.items():
            for quantity, value in _curves(layer).items():
                if value is not None and math.isfinite(value):
                    self._writer.add_scalar(f"{quantity}/{path}", value, record.step)
            if layer.factor_mean is not None and layer.factor_std is not None:
                self._add_histogram(f"factors/{path}", layer, record.step)

    def flush(self) -> None:
        """Bring the points to the disk, which the writer otherwise does every two minutes."""
        self._writer.flush()

    def _add_histogram(self, tag: str, layer: LayerRecord, step: int) -> None:
        count = sum(layer.factor_histogram)
        mean, spread = float(layer.factor_mean or 0), float(layer.factor_std or 0)
        self._writer.add_histogram_raw(
            tag,
            min=HISTOGRAM_EDGES[0],
            max=HISTOGRAM_EDGES[-1],
            num=count,
            sum=mean * count,
            sum_squares=spread**2 * (count - 1) + mean**2 * count,
            bucket_limits=list(HISTOGRAM_EDGES[1:]),
            bucket_counts=list(layer.factor_histogram),
            global_step=step,
        )


def _curves(layer: LayerRecord) -> dict[str, float | None]:
    return {
        "factor mean": layer.factor_mean,
        "factor std": layer.factor_std,
        "crystallized fraction": layer.crystallized_fraction,
        "replaced synapses": layer.replaced,
        "density": layer.density,
        "turnover": None if layer.connections is None else layer.turnover,
        "wrong signs": layer.wrong_signs,
        "E-I ratio": layer.ei_ratio,
        "gradient norm": layer.gradient_norm,
        "update norm": layer.update_norm,
    }


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
        from rich.text import Text

        layer = self._latest[path]
        factors = _or_dash(layer.factor_mean, ".2f")
        if layer.factor_std is not None:
            factors += f"±{layer.factor_std:.2f}"
        return [
            Text(factors),
            Text(_or_dash(layer.crystallized_fraction, ".1%")),
            Text(_shortened(self._replaced[path])),
            Text(_or_dash(layer.wrong_signs, ",d"), style="bold red" if layer.wrong_signs else ""),
            Text(_or_dash(layer.ei_ratio, ".2f" if layer.ei_ratio < 100 else ".0e")),
            Text(_or_dash(layer.gradient_norm, ".1e")),
            Text(_or_dash(layer.update_norm, ".1e")),
        ]


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _shortened(value: int) -> str:
    return f"{value:,}" if value < 10**6 else f"{value / 10**6:.1f}M"
