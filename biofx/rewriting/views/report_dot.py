"""A report's graph in the language of Graphviz."""

from __future__ import annotations

import re
from collections.abc import Iterator

from biofx.graph.graph_view import NodeView
from biofx.rewriting.remarks import ReportRecord
from biofx.rewriting.views.drawing import MARKS, PALETTE, Side, Touch, changing, touches_of, view_of

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def report_dot(report: ReportRecord, side: Side = "after") -> str:
    """Return one of the report's graphs as text for ``dot``; see ``Report.to_dot``."""
    view, touches = view_of(report, side), touches_of(report)
    root = _Cluster("")
    for node in view.nodes:
        root.at([path for path, _ in node.calls if path]).nodes.append(node)
    lines = [
        f"digraph {_quoted(report.model)} {{",
        f"  label={_quoted(f'{report.model}: {report.summary()}')}; labelloc=t;",
        '  node [shape=box, style="rounded,filled", fillcolor="#f6f8fa", color="#c3cad2", '
        'fontname="monospace", fontsize=10];',
        '  edge [color="#9aa4af"];',
        *root.lines(touches, report, "  "),
    ]
    for node in view.nodes:
        lines += [f"  {_quoted(source)} -> {_quoted(node.name)};" for source in node.inputs]
    return "\n".join((*lines, "}")) + "\n"


class _Cluster:
    """The nodes of a module, those of its submodules in clusters of their own."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.nodes: list[NodeView] = []
        self.inner: dict[str, _Cluster] = {}

    def at(self, paths: list[str]) -> _Cluster:
        cluster = self
        for path in paths:
            cluster = cluster.inner.setdefault(path, _Cluster(path))
        return cluster

    def lines(
        self, touches: dict[str, tuple[Touch, ...]], report: ReportRecord, indent: str
    ) -> Iterator[str]:
        for node in self.nodes:
            yield f"{indent}{_node(node, touches.get(node.name, ()), report)}"
        for cluster in self.inner.values():
            if len(cluster.nodes) == 1 and not cluster.inner:  # a frame around a single box tells nothing
                yield from cluster.lines(touches, report, indent)
                continue
            yield f"{indent}subgraph {_quoted(f'cluster_{self.path}/{cluster.path}')} {{"
            yield f'{indent}  label={_quoted(cluster.path)}; color="#c3cad2"; fontsize=10;'
            yield from cluster.lines(touches, report, indent + "  ")
            yield f"{indent}}}"


def _node(node: NodeView, touches: tuple[Touch, ...], report: ReportRecord) -> str:
    marks = "".join(MARKS[touch.kind] for touch in touches)
    label = f"{node.name} {marks}".rstrip()
    attributes = [f"label={_quoted(label, node.what)}", f"tooltip={_quoted(node.line)}"]
    change = changing(touches)
    if change is not None:
        attributes += [f'color="{PALETTE[change.number % len(PALETTE)]}"', "penwidth=2"]
        attributes.append(f"class={_quoted(report.passes[change.number].name)}")
    elif touches:
        attributes.append('style="rounded,filled,dashed"')
    return f"{_quoted(node.name)} [{', '.join(attributes)}];"


def _quoted(*lines: str) -> str:
    """Return a quoted string, each line centred; a backslash would begin an escape of Graphviz's own."""
    shown = (_CONTROL.sub("\ufffd", line).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(shown) + '"'
