"""What happened to a graph: every node that changed, every candidate left alone, and why.

The JSON form (:meth:`Report.to_json`) is an object with these keys; a reader should check ``schema``:

``schema``
    ``"biofx.rewriting.report/1"``; the number goes up when a key changes its meaning or disappears.
``model``
    Class name of the model.
``modified``
    Whether the graph differs from the traced one.
``changes``
    The nodes that differ between the first graph and the last: objects with ``kind`` (``"created"``,
    ``"erased"``, ``"rewired"``: other inputs or options, ``"replaced"``: another operation), ``node``,
    ``before`` and ``after`` (the node as a line of text, or null) and ``because`` (name of the candidate
    whose rewrite changed it, or null).
``coverage``
    Every parameter, or null: an object with ``total``, ``rewritten`` and ``visible`` (elements, counts),
    ``left`` (objects with ``path``, ``elements``, ``reason`` and ``is_visible``) and ``kept`` (modules that
    keep their own forward in Python: path to reason).
``unmet``
    What was asked for and is not there: objects with ``mechanism``, ``layer`` (the one named for it, or
    empty), ``considered`` (layers, a count) and ``message``.
``passes``
    In the order they ran: objects with ``name``, ``text`` (the pass as pipeline text), ``seconds``,
    ``applied`` and ``missed`` (counts), ``changes`` (as above, for this pass alone) and ``remarks``:
    objects with ``kind`` (``"applied"`` or ``"missed"``), ``node`` (or null for a layer that is never
    called), ``layer``, ``message`` and ``details`` (the numbers behind the message).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from torch.fx import Node

from biofx.graph.changes import Change
from biofx.graph.graph_view import GraphView
from biofx.rewriting.model_coverage import ModelCoverage
from biofx.rewriting.unmet import Unmet
from biofx.toml import write_whole

SCHEMA = "biofx.rewriting.report/1"


@dataclass(frozen=True)
class Remark:
    """What a pass did with one candidate, or why it left it alone."""

    kind: Literal["applied", "missed"]
    node: str | None
    """Name of the candidate node; None for a layer that the graph never calls."""
    layer: str
    """Path of the candidate's layer, empty for the model itself."""
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)
    """The numbers behind the message."""

    @property
    def subject(self) -> str:
        """The candidate for a reader: its layer, and its node where that has another name."""
        if self.node is None or self.layer.replace(".", "_") == self.node.removeprefix("_"):
            return self.layer
        return f"{self.node} ({self.layer})" if self.layer else self.node

    def __str__(self) -> str:
        return f"{self.kind:<7} {self.subject}: {self.message}"


def applied(node: Node, layer: str, message: str, **details: Any) -> Remark:
    """Say that a candidate was rewritten, and how."""
    return Remark("applied", node.name, layer, message, details)


def missed(node: Node | None, layer: str, message: str, **details: Any) -> Remark:
    """Say that a candidate was left alone, and why."""
    return Remark("missed", None if node is None else node.name, layer, message, details)


@dataclass(frozen=True)
class PassReport:
    """What one pass did."""

    name: str
    text: str
    """The pass as pipeline text."""
    remarks: tuple[Remark, ...]
    changes: tuple[Change, ...]
    seconds: float = 0.0
    unmet: tuple[Unmet, ...] = ()
    """What was asked of it and is not there."""

    @property
    def applied(self) -> int:
        """How many candidates were rewritten."""
        return sum(remark.kind == "applied" for remark in self.remarks)

    @property
    def missed(self) -> int:
        """How many candidates were left alone."""
        return len(self.remarks) - self.applied


@dataclass(frozen=True)
class Report:
    """What a pipeline did to a model; print it, or ``rich.print`` it, or take :meth:`to_json`."""

    model: str
    passes: tuple[PassReport, ...]
    changes: tuple[Change, ...]
    """The nodes that differ between the graph that went in and the graph that came out."""
    before: GraphView | None = field(default=None, compare=False, repr=False)
    """The graph that went in; None for a report that was put together by hand."""
    after: GraphView | None = field(default=None, compare=False, repr=False)
    """The graph that came out."""
    coverage: ModelCoverage | None = None
    """Every parameter: rewritten, or left alone with a reason; None in a report of graphs alone."""

    @property
    def modified(self) -> bool:
        """Whether any node differs."""
        return bool(self.changes)

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """The remarks of all passes, in order."""
        return tuple(remark for entry in self.passes for remark in entry.remarks)

    @property
    def unmet(self) -> tuple[Unmet, ...]:
        """What was asked for and is not there, of all passes."""
        return tuple(entry for part in self.passes for entry in part.unmet)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, in the schema that this module's docstring describes."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "modified": self.modified,
            "changes": [dict(vars(change)) for change in self.changes],
            "unmet": [dict(vars(entry)) for entry in self.unmet],
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "passes": [
                {
                    "name": entry.name,
                    "text": entry.text,
                    "seconds": entry.seconds,
                    "applied": entry.applied,
                    "missed": entry.missed,
                    "remarks": [vars(remark) | {"details": dict(remark.details)} for remark in entry.remarks],
                    "changes": [dict(vars(change)) for change in entry.changes],
                }
                for entry in self.passes
            ],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the report as one page to look at: both graphs side by side, remarks, coverage, times.

        The page needs no other file and no network, and opens from disk. Equal reports give equal pages.

        Args:
            path: also written to this file, whole or not at all.

        Raises:
            InputError: the report was put together by hand, and holds no graphs.
            OptionError: the file cannot be written.
        """
        from biofx.rewriting.views.report_html import report_html

        return _written(report_html(self), path)

    def to_svg(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        graph: Literal["before", "after", "both"] = "after",
    ) -> str:
        """Return a picture of a graph, its nodes coloured by the passes that touched them.

        Args:
            path: also written to this file, whole or not at all.
            graph: the one that went in, the one that came out, or that with what was erased.

        Raises:
            InputError: the report was put together by hand, and holds no graphs.
            OptionError: there is no such graph, or the file cannot be written.
        """
        from biofx.rewriting.views.report_svg import report_svg

        return _written(report_svg(self, graph), path)

    def to_dot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        graph: Literal["before", "after", "both"] = "after",
    ) -> str:
        """Return a graph in the language of Graphviz, modules as clusters; else as :meth:`to_svg`."""
        from biofx.rewriting.views.report_dot import report_dot

        return _written(report_dot(self, graph), path)

    def summary(self) -> str:
        """Return one line: how many nodes differ, and how, and how much of what was asked is not there."""
        missed = f"; asked for and not there: {len(self.unmet)}" if self.unmet else ""
        return self._what_differs() + missed

    def _what_differs(self) -> str:
        if not self.passes:
            return "no pass ran: every mechanism is off"
        if not self.changes:
            return "the graph is unchanged"
        kinds = ("created", "replaced", "rewired", "erased")
        counts = {kind: sum(change.kind == kind for change in self.changes) for kind in kinds}
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) + " nodes"

    def _lines(self) -> Iterator[str]:
        yield f"{self.model}: {self.summary()}"
        yield from self.unmet_lines()
        yield from self.kept_lines()
        for entry in self.passes:
            yield f"{entry.text}: {entry.applied} applied, {entry.missed} left alone"
            yield from (f"  {remark}" for remark in entry.remarks)
            yield from (f"  {_describe(change)}" for change in entry.changes)

    def unmet_lines(self) -> Iterator[str]:
        """Yield a line for each thing that was asked for and is not there, with the reason."""
        yield from (f"asked: {entry}" for entry in self.unmet)

    def kept_lines(self) -> Iterator[str]:
        """Yield lines on the modules that are not part of a graph: why, and how much that leaves."""
        if self.coverage is not None and self.coverage.kept:
            yield f"in Python: {len(self.coverage.kept)} modules keep their own forward; {self.coverage}"
            for path, reason in self.coverage.kept.items():
                yield f"  {path or 'the model'}: {reason}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from biofx.rewriting.views.report_table import report_table

        yield report_table(self)


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        write_whole(os.fspath(path), text)
    return text


def _describe(change: Change) -> str:
    line = change.before if change.after is None else change.after
    return f"{change.kind:<8} {line}"
