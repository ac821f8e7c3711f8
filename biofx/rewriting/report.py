"""What happened to a graph: every node that changed, every candidate left alone, and why.

The JSON form (:meth:`Report.to_json`) is an object with these keys; a reader should check ``schema``:

``schema``
    ``"biofx.report/1"``; the number goes up when a key changes its meaning or disappears.
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
    ``left`` (objects with ``path``, ``elements``, ``reason`` and ``is_visible``), ``kept`` (modules that
    keep their eager forward in Python: path to reason) and ``mechanisms``: how far those reached whose passes
    ran, objects with ``mechanism`` (``"signed"``, ``"scaled"`` or ``"split"``), ``weights`` of
    ``all_weights`` and ``elements`` of ``all_elements`` (counts), ``reasons`` (why not the rest: reason to
    elements) and ``exempt`` (what the mechanism is not for: reason to elements).
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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch.fx import GraphModule

from biofx.graph.changes import Change
from biofx.model.shown_model import draw_models_with
from biofx.rewriting.folded_remarks import fold_remarks
from biofx.rewriting.remarks import Remark, ReportRecord
from biofx.toml import write_whole

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA = "biofx.report/1"


@dataclass(frozen=True)
class Report(ReportRecord):
    """What a pipeline did to a model; print it, or ``rich.print`` it, or take :meth:`to_json`."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.model}: {self.summary()}>"

    def _repr_html_(self) -> str:
        from biofx.rewriting.views.notebook import report_page

        return report_page(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, in the schema that this module's docstring describes."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "modified": self.modified,
            "changes": [_change_to_dict(change) for change in self.changes],
            "unmet": [dict(vars(entry)) for entry in self.unmet],
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "passes": [
                {
                    "name": entry.name,
                    "text": entry.text,
                    "seconds": entry.seconds,
                    "applied": entry.applied,
                    "missed": entry.missed,
                    "remarks": [_remark_to_dict(remark) for remark in entry.remarks],
                    "changes": [_change_to_dict(change) for change in entry.changes],
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
        from biofx.rewriting.views.pictures import report_svg

        return _written(report_svg(self, graph), path)

    def to_dot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        graph: Literal["before", "after", "both"] = "after",
    ) -> str:
        """Return a graph in the language of Graphviz, modules as clusters; else as :meth:`to_svg`."""
        from biofx.rewriting.views.pictures import report_dot

        return _written(report_dot(self, graph), path)

    def _lines(self) -> Iterator[str]:
        yield f"{self.model}: {self.summary()}"
        yield from self.unmet_lines()
        yield from self.kept_lines()
        for entry in self.passes:
            yield f"{entry.text}: {entry.applied} applied, {entry.missed} left alone"
            yield from (f"  {remarks}" for remarks in fold_remarks(entry.remarks))
            yield from (f"  {_describe(change)}" for change in entry.changes)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from biofx.rewriting.views.terminal import report_table

        yield report_table(self)


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        write_whole(os.fspath(path), text)
    return text


def _remark_to_dict(remark: Remark) -> dict[str, Any]:
    known = ("kind", "node", "layer", "message")
    return {**{name: getattr(remark, name) for name in known}, "details": dict(remark.details)}


def _change_to_dict(change: Change) -> dict[str, Any]:
    known = ("kind", "node", "before", "after")
    return {**{name: getattr(change, name) for name in known}, "because": change.cause}


def _describe(change: Change) -> str:
    line = change.before if change.after is None else change.after
    return f"{change.kind:<8} {line}"


def _drawn(model: GraphModule) -> str | None:
    from biofx.rewriting.views.pictures import model_svg

    return model_svg(model)


draw_models_with(_drawn)
