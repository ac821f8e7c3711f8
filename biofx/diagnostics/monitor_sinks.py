"""A monitor's records in a file of JSON lines, which has everything (``monitor_curves`` has less).

A file of JSON lines begins with an object about the run; a reader should check its ``schema``:

``schema``
    ``"biofx.run/2"``; the number goes up when a key changes its meaning or disappears. Files of
    ``"biofx.run/1"`` are read too, without ``crystallized``, which also counted factors drawn low.
``crystallized_below``
    The factor below which ``crystallized`` counts, dimensionless.
``dormancy``
    The fraction of the layer's mean activity up to which a unit counts as ``dormant``, dimensionless.
``histogram_edges``
    The edges of ``factor_histogram``; its first and last bin also hold what lies beyond them.

Each further line is one recorded step: an object with ``step`` (from 0) and ``layers``, which has for each
weight's path an object with the fields of :class:`biofx.diagnostics.LayerRecord`, and in it, as ``activity``,
one with those of :class:`biofx.diagnostics.UnitActivity`: null is what a layer does not have, and the texts
``"nan"``, ``"inf"`` and ``"-inf"`` are what JSON has no numbers for. Several optimizers on one model write a
line each, with their own weights. A run that went on from a checkpoint repeats the steps since; the later
line of a step counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from biofx.diagnostics.monitor_records import HISTOGRAM_EDGES, LayerRecord, StepRecord, Thresholds
from biofx.diagnostics.unit_activity import UnitActivity
from biofx.errors import OptionError

SCHEMA = "biofx.run/2"
_FORMER = "biofx.run/1"
_NUMBERS = ("excitation", "inhibition")
_OPTIONAL_NUMBERS = ("factor_mean", "factor_std", "gradient_norm", "update_norm")
_OPTIONAL_COUNTS = ("crystallized", "wrong_signs", "wrong_signs_raw")
_ADDED = ("connections",)
"""Counts that files of older versions lack."""
_ADDED_NUMBERS = ("utility", "unit_utility", "unit_age")
_COUNTS_OF_ACTIVITY = ("units", "samples", "dormant", "dead", "rank_samples")
_NUMBERS_OF_ACTIVITY = ("mean_magnitude", "effective_rank", "stable_rank")


class JsonLines:
    """Writes records to a file, each at once and whole, so that a crash costs at most the line at hand.

    Raises:
        OptionError: the file holds something already and ``append`` is not set, is of another kind, or
            cannot be used.
    """

    def __init__(self, path: Path, thresholds: Thresholds, *, append: bool) -> None:
        self._path = path.absolute()
        self._header = {
            "schema": SCHEMA,
            **asdict(thresholds),
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
            header = _header(self._path, next(_parsed(self._path, content.split(b"\n")[:1])))
            if header["schema"] != SCHEMA:
                raise OptionError(
                    f"{self._path}: expected to continue a file of {SCHEMA!r}, found one of an older version "
                    f"({header['schema']!r}), in which counts mean something else; name another file"
                )
            found, _ = read_json_lines(self._path)
            for name, wanted in asdict(thresholds).items():
                if (held := getattr(found, name)) != wanted:
                    raise OptionError(
                        f"expected {self._path} to have {name}={wanted}, found {held}; use the same "
                        "threshold, or name another file"
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


def read_json_lines(path: Path) -> tuple[Thresholds, list[StepRecord]]:
    """Return the thresholds and the records of a file.

    Raises:
        OptionError: the file cannot be read, is of another kind or version, or a line is no record; but a
            last line without its end is left out.
    """
    whole_lines = _content(path).split(b"\n")[:-1]  # what follows the last line end was never finished
    parsed = _parsed(path, whole_lines)
    header = _header(path, next(parsed, None))
    found, is_former = {}, header["schema"] == _FORMER
    for name in ("crystallized_below", *(() if is_former else ("dormancy",))):
        threshold = header.get(name)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise OptionError(f"{path}, line 1: expected a number as {name}, found {threshold!r}")
        found[name] = float(threshold)
    records = []
    for number, entry in enumerate(parsed, 2):
        try:
            records.append(_from_plain(entry, is_former=is_former))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise OptionError(f"{path}, line {number}: expected a recorded step: {reason}") from error
    return Thresholds(**found), records


def _header(path: Path, header: Any) -> dict[str, Any]:
    if not isinstance(header, dict) or header.get("schema") not in (SCHEMA, _FORMER):
        found = header.get("schema") if isinstance(header, dict) else header
        raise OptionError(f"{path}: expected the records of a monitor, {SCHEMA!r}, found {found!r}")
    return header


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
    layers = {path: _spelled(vars(layer)) for path, layer in record.layers.items()}
    return {"step": record.step, "layers": layers}


def _from_plain(entry: Any, *, is_former: bool) -> StepRecord:
    former = {"crystallized": None} if is_former else {}
    layers = {str(path): _layer_from_plain({**fields, **former}) for path, fields in entry["layers"].items()}
    return StepRecord(_count(entry["step"]), layers)


def _layer_from_plain(fields: Mapping[str, Any]) -> LayerRecord:
    others: dict[str, Any] = {name: _number(fields[name]) for name in _NUMBERS}
    for names, convert in ((_OPTIONAL_NUMBERS, _number), (_OPTIONAL_COUNTS, _count)):
        others |= {name: None if fields[name] is None else convert(fields[name]) for name in names}
    added: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(_ADDED, _count),
        **dict.fromkeys(_ADDED_NUMBERS, _number),
        "activity": _activity_from_plain,
    }
    others |= {name: read(fields[name]) for name, read in added.items() if fields.get(name) is not None}
    return LayerRecord(
        synapses=_count(fields["synapses"]),
        factor_histogram=tuple(map(_count, fields["factor_histogram"])),
        touched={str(rule): _count(count) for rule, count in fields["touched"].items()},
        **others,
    )


def _activity_from_plain(fields: Any) -> UnitActivity:
    found: dict[str, Any] = {name: _count(fields[name]) for name in _COUNTS_OF_ACTIVITY}
    found |= {name: _number(fields[name]) for name in _NUMBERS_OF_ACTIVITY}
    return UnitActivity(**found)


def _spelled(value: Any) -> Any:
    if isinstance(value, UnitActivity):
        return _spelled(vars(value))
    if isinstance(value, dict):
        return {name: _spelled(entry) for name, entry in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    if value in ("nan", "inf", "-inf") or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return float(value)
    raise ValueError(f"found {value!r} where a number belongs")


def _count(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"found {value!r} where a count belongs")
