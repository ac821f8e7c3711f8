"""A report's graph as an SVG picture, or in the language of Graphviz."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from torch.fx import GraphModule

from biofx.graph.graph_view import GraphView, NodeView
from biofx.rewriting.remarks import ReportRecord
from biofx.rewriting.views.drawing import (
    MARKS,
    PALETTE,
    Side,
    Touch,
    TouchKind,
    changing,
    layout_of,
    touches_of,
    view_of,
)
from biofx.rewriting.views.layered_layout import LONGEST, Layout

COLUMN, ROW = 196.0, 58.0  # pixels from one place to the next
BOX_WIDTH, BOX_HEIGHT = 176.0, 38.0
MARGIN = 24.0
LARGEST_SHOWN = 40
"""Nodes of a graph that is drawn wherever its model or report is shown."""
_LEGEND_LINE = 20.0
_BAR = 5.0
_NAME_LENGTH, _WHAT_LENGTH = 22, 24  # characters that fit a box

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_STYLE = """
text { font: 11px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1b1f24; }
.back { fill: #ffffff; }
.box { fill: #f6f8fa; stroke: #c3cad2; }
.what { fill: #57606a; font-size: 10px; }
.mark { text-anchor: end; font-weight: bold; }
.edge { fill: none; stroke: #9aa4af; stroke-width: 1.2; }
.far { stroke-dasharray: 3 4; opacity: 0.5; }
.considered .box { stroke-dasharray: 4 3; }
.erased { opacity: 0.55; }
.erased .name { text-decoration: line-through; }
.legend text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 12px; }
.legend .title { font-weight: bold; font-size: 14px; }
""" + "".join(
    f".p{number} {{ fill: {color}; }} .t{number} .box {{ stroke: {color}; stroke-width: 1.5; }}\n"
    for number, color in enumerate(PALETTE)
)


def report_svg(report: ReportRecord, side: Side = "after") -> str:
    """Return the picture of one of the report's graphs; see ``Report.to_svg``."""
    view = view_of(report, side)
    legend = [*_legend(report, side)]
    titles, lines = _titles(report), len(report.passes) + 1
    title = f"{report.model}: {report.summary()}"
    return _picture(view, title, legend, lines, touches=touches_of(report), titles=titles)


def model_svg(graph_module: GraphModule) -> str | None:
    """Return the picture of a model's graph for a notebook, None where it has many nodes."""
    if len(graph_module.graph.nodes) > LARGEST_SHOWN:
        return None
    view, name = GraphView.of(graph_module), type(graph_module).__name__
    return _picture(
        view, name, [f'<text class="title" y="4">{escaped(name)}</text>'], 1, touches={}, titles={}
    )


def _picture(
    view: GraphView,
    title: str,
    legend: Sequence[str],
    lines: int,
    *,
    touches: Mapping[str, tuple[Touch, ...]],
    titles: Mapping[str, list[str]],
) -> str:
    layout = layout_of(view, view)
    top = _LEGEND_LINE * lines + MARGIN
    width = max(layout.columns * COLUMN, 560.0) + 2 * MARGIN
    height = layout.rows * ROW + top + MARGIN
    return "".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
            f"<title>{escaped(title)}</title><style>{_STYLE}</style>",
            '<rect class="back" width="100%" height="100%"/>',
            f'<g class="legend" transform="translate({MARGIN:.0f} {MARGIN:.0f})">',
            *legend,
            "</g>",
            f'<g transform="translate({MARGIN:.0f} {top + MARGIN:.0f})">',
            draw(view, layout, touches, titles=titles),
            "</g></svg>\n",
        )
    )


def draw(
    view: GraphView,
    layout: Layout,
    touches: Mapping[str, tuple[Touch, ...]],
    *,
    titles: Mapping[str, list[str]] | None = None,
    numbers: Mapping[str, int] | None = None,
) -> str:
    """Return edges and nodes as SVG elements, for a page or a picture to wrap and to style.

    Args:
        view: the graph.
        layout: places of all its nodes.
        touches: what passes did to them.
        titles: lines to show when a pointer rests on a node.
        numbers: of the nodes, for a script.
    """
    parts = []
    for node in view.nodes:
        for source in node.inputs:
            points = [
                layout.places[source],
                *layout.routes.get((source, node.name), ()),
                layout.places[node.name],
            ]
            far = " far" if points[-1][1] - points[0][1] > LONGEST else ""
            known = "" if numbers is None else f' data-u="{numbers[source]}" data-v="{numbers[node.name]}"'
            parts.append(f'<path class="edge{far}"{known} d="{_path(points)}"/>')
    for node in view.nodes:
        x, row = layout.places[node.name]
        known = "" if numbers is None else f' data-i="{numbers[node.name]}"'
        title = "" if titles is None else _title(node, titles.get(node.name, []))
        parts.append(
            f'<g class="{_classes(touches.get(node.name, ()))}"{known} '
            f'transform="translate({x * COLUMN:.1f} {row * ROW:.1f})">{title}'
            f"{''.join(_box(node, touches.get(node.name, ())))}</g>"
        )
    return "".join(parts)


def escaped(text: str) -> str:
    """Return a text escaped for XML; characters that XML cannot contain become ``U+FFFD``."""
    return html.escape(_NOT_IN_XML.sub("\ufffd", text), quote=True)


def shortened(text: str, length: int) -> str:
    """Return a text of at most that many characters, its middle left out where it is longer.

    >>> shortened("layer4_1_conv2_weight", 12)
    'layer4…eight'
    """
    if len(text) <= length:
        return text
    head = length // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"


def _classes(touches: Sequence[Touch]) -> str:
    change = changing(touches)
    if change is not None:
        return f"node changed {change.kind} t{change.number % len(PALETTE)}"
    return f"node considered t{touches[-1].number % len(PALETTE)}" if touches else "node"


def _box(node: NodeView, touches: Sequence[Touch]) -> Iterator[str]:
    yield f'<rect class="box" width="{BOX_WIDTH:.0f}" height="{BOX_HEIGHT:.0f}" rx="5"/>'
    for place, touch in enumerate(touches):
        faint = ' opacity="0.35"' if touch.kind == "missed" else ""
        yield (
            f'<rect class="bar p{touch.number % len(PALETTE)}"{faint} x="{4 + place * (_BAR + 2):.0f}" y="5" '
            f'width="{_BAR:.0f}" height="{BOX_HEIGHT - 10:.0f}" rx="1.5"/>'
        )
    left = 8 + len(touches) * (_BAR + 2)
    room = len(touches)  # a bar takes about a character
    name = shortened(node.name, _NAME_LENGTH - room)
    yield f'<text class="name" x="{left:.0f}" y="16">{escaped(name)}</text>'
    what = shortened(_details(node), _WHAT_LENGTH - room)
    yield f'<text class="what" x="{left:.0f}" y="30">{escaped(what)}</text>'
    if touches:
        yield f'<text class="mark" x="{BOX_WIDTH - 6:.0f}" y="16">{MARKS[_loudest(touches)]}</text>'


def _loudest(touches: Sequence[Touch]) -> TouchKind:
    order = list(MARKS)
    return min((touch.kind for touch in touches), key=order.index)


def _details(node: NodeView) -> str:
    """Return the operation, and the shape of a parameter."""
    _, comment, note = node.line.partition("  # ")
    return f"{node.what} {note}" if node.op == "get_attr" and comment else node.what


def _path(points: Sequence[tuple[float, int]]) -> str:
    """Return a smooth curve down from the lower edge of one box to the upper edge of another."""
    places = [(x * COLUMN + BOX_WIDTH / 2, row * ROW + BOX_HEIGHT / 2) for x, row in points]
    places[0] = (places[0][0], places[0][1] + BOX_HEIGHT / 2)
    places[-1] = (places[-1][0], places[-1][1] - BOX_HEIGHT / 2)
    drawn = [f"M{places[0][0]:.1f} {places[0][1]:.1f}"]
    for (x, y), (to_x, to_y) in pairwise(places):
        bend = (to_y - y) / 2
        drawn.append(f"C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}")
    return "".join(drawn)


def _title(node: NodeView, lines: Sequence[str]) -> str:
    return f"<title>{escaped(chr(10).join((node.line, *lines)))}</title>"


def _titles(report: ReportRecord) -> dict[str, list[str]]:
    said: dict[str, list[str]] = {}
    for entry in report.passes:
        for remark in entry.remarks:
            if remark.node is not None:
                said.setdefault(remark.node, []).append(f"{entry.name}, {remark.kind}: {remark.message}")
    return said


def _legend(report: ReportRecord, side: Side) -> Iterator[str]:
    when = {"before": " (before)", "after": "", "both": " (with what was erased)"}[side]
    yield f'<text class="title" y="4">{escaped(report.model + when)}: {escaped(report.summary())}</text>'
    for number, entry in enumerate(report.passes):
        y = _LEGEND_LINE * (number + 1)
        yield f'<rect class="p{number % len(PALETTE)}" width="10" height="10" y="{y - 5:.0f}" rx="2"/>'
        text = f"{shortened(entry.text, 60)}: {entry.applied} applied, {entry.missed} left alone"
        yield f'<text x="18" y="{y + 4:.0f}">{escaped(text)}</text>'


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
            yield f"{indent}{_dot_node(node, touches.get(node.name, ()), report)}"
        for cluster in self.inner.values():
            if len(cluster.nodes) == 1 and not cluster.inner:  # a frame around a single box tells nothing
                yield from cluster.lines(touches, report, indent)
                continue
            yield f"{indent}subgraph {_quoted(f'cluster_{self.path}/{cluster.path}')} {{"
            yield f'{indent}  label={_quoted(cluster.path)}; color="#c3cad2"; fontsize=10;'
            yield from cluster.lines(touches, report, indent + "  ")
            yield f"{indent}}}"


def _dot_node(node: NodeView, touches: tuple[Touch, ...], report: ReportRecord) -> str:
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
