"""A report as one page that needs no network and no other file.

Texts from the model are in the page as escaped text in the pictures, or as JSON that the script of the page
shows as text. A content security policy allows the script and the style that are part of the page, and no
requests.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

from biofx.graph.graph_view import GraphView
from biofx.rewriting.model_coverage import PassCoverage
from biofx.rewriting.remarks import Remark, ReportRecord
from biofx.rewriting.views.drawing import PALETTE, Touch, layout_of, touches_of, united_order
from biofx.rewriting.views.pictures import BOX_HEIGHT, BOX_WIDTH, COLUMN, ROW, draw

_SCRIPTS = ("data", "selectors", "picture", "camera", "details", "search", "tree", "start")
_SLOT = re.compile("@([a-z]+)@")


def report_html(report: ReportRecord) -> str:
    """Return the page; see ``Report.to_html``."""
    before, after = report.graphs()
    numbers = {name: place for place, name in enumerate(united_order(before, after))}
    layout, touches = layout_of(before, after), touches_of(report)
    colors = "".join(
        f".p{number} {{ fill: {color}; background: {color}; }} .t{number} .box {{ stroke: {color}; }}\n"
        for number, color in enumerate(PALETTE)
    )
    style, script = _part("report.css") + colors, _script()
    data: dict[str, Any] = {
        "sizes": {"column": COLUMN, "row": ROW, "width": BOX_WIDTH, "height": BOX_HEIGHT},
        "colors": len(PALETTE),
        "names": list(numbers),
        "places": [layout.places[name] for name in numbers],
        "routes": [
            [numbers[u], numbers[v], points] for (u, v), points in layout.routes.items() if len(points) > 0
        ],
        "touches": [
            [numbers[name], [_touch(touch, numbers) for touch in found]]
            for name, found in touches.items()
            if name in numbers
        ],
        "passes": [
            {
                "name": entry.name,
                "text": entry.text,
                "seconds": entry.seconds,
                "applied": entry.applied,
                "missed": entry.missed,
                "coverage": _coverage(entry.coverage(before)),
                "remarks": [_remark(remark, numbers) for remark in entry.remarks],
            }
            for entry in report.passes
        ],
        "whole": None if report.coverage is None else str(report.coverage),
        "kept": [] if report.coverage is None else list(report.coverage.kept.items()),
        "mechanisms": [] if report.coverage is None else list(map(str, report.coverage.mechanisms)),
        "classes": _classes(before, after),
    }
    place_of = {tuple(names): place for place, names in enumerate(data["classes"])}
    data["graphs"] = {
        side: _graph(view, numbers, place_of) for side, view in (("before", before), ("after", after))
    }
    allowed = f"style-src {_hash(style)}; script-src {_hash(script)}"
    slots = {
        "policy": f"default-src 'none'; base-uri 'none'; {allowed}",
        "title": html.escape(f"{report.model}: what biofx did"),
        "model": html.escape(report.model),
        "summary": html.escape(report.summary()),
        "style": style,
        "script": script,
        "data": _json_for_page(data),
        "before": draw(before, layout, touches, numbers=numbers),
        "after": draw(after, layout, touches, numbers=numbers),
    }
    # in one go: what is filled in is never looked at again, so a model cannot name a slot
    return _SLOT.sub(lambda slot: slots[slot.group(1)], _part("report.html"))


def _script() -> str:
    """Return the parts of the script as one, in a scope of its own."""
    parts = "\n".join(_part(f"{name}.js") for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def _part(name: str) -> str:
    return (files("biofx.rewriting.views") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json_for_page(data: object) -> str:
    """Return JSON that cannot end the element it stands in, nor begin another."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _touch(touch: Touch, numbers: dict[str, int]) -> list[Any]:
    return [touch.number, touch.kind, numbers.get(str(touch.cause))]


def _remark(remark: Remark, numbers: dict[str, int]) -> list[Any]:
    details = {str(key): _plain(value) for key, value in remark.details.items()}
    node = None if remark.node is None else numbers.get(remark.node, remark.node)
    return [remark.kind, node, remark.layer, remark.message, details]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _coverage(coverage: PassCoverage) -> dict[str, Any]:
    return {**vars(coverage), "fraction": coverage.fraction, "reasons": list(coverage.reasons.items())}


def _classes(*graphs: GraphView) -> list[list[str]]:
    found = dict.fromkeys(module.classes for graph in graphs for module in graph.modules.values())
    return [list(names) for names in found]


def _graph(view: GraphView, numbers: dict[str, int], place_of: dict[tuple[str, ...], int]) -> dict[str, Any]:
    return {
        "nodes": [
            [numbers[node.name], node.line, [numbers[source] for source in node.inputs], node.calls]
            for node in view.nodes
        ],
        "modules": [
            [path, place_of[module.classes], module.parameters] for path, module in view.modules.items()
        ],
    }
