"""The monitor's records as lines of JSON, written and read.

A file begins with an object about the run; a reader should check its ``schema``:

``schema``
    ``"biofx.run/1"``; the number goes up when a key changes its meaning or disappears.
``crystallized_below``
    The factor below which ``crystallized`` counts, dimensionless.
``histogram_edges``
    The edges of ``factor_histogram``; its first and last bin also hold what lies beyond them.

Each further line is one recorded step: an object with ``step`` (from 0) and ``layers``, which has for each
weight's path an object with the fields of :class:`biofx.monitor_records.LayerRecord`: null is what a layer
does not have, and the texts ``"nan"``, ``"inf"`` and ``"-inf"`` are what JSON has no numbers for. Several
optimizers on one model write a line each, with their own weights. A run that went on from a checkpoint
repeats the steps since; the later line of a step counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from biofx.diagnostics.monitor_records import HISTOGRAM_EDGES, LayerRecord, StepRecord
from biofx.errors import OptionError

SCHEMA = "biofx.run/1"
_NUMBERS = ("excitation", "inhibition")
_OPTIONAL_NUMBERS = ("factor_mean", "factor_std", "gradient_norm", "update_norm")
_OPTIONAL_COUNTS = ("crystallized", "wrong_signs", "wrong_signs_raw")


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
                f"expected a new or empty file, found {self._path} with {len(content)} bytes; go on with it "
                "(append=True), name another one, or remove it"
            )
        if content:
            found, _ = read_json_lines(self._path)
            if found != crystallized_below:
                raise OptionError(
                    f"expected {self._path} to have crystallized_below={crystallized_below}, found {found}; "
                    "go on with the same threshold, or name another file"
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
