"""What all pictures of a report share: the nodes, their places, and what each pass did to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from biofx.errors import OptionError
from biofx.graph.graph_view import GraphView
from biofx.rewriting.remarks import ReportRecord
from biofx.rewriting.views.layered_layout import Layout, layered_layout

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a6fdf", "#7f7f00")
"""Colours of the passes, in the order they ran; more passes start again with the first.

Source: the first six are those that Okabe and Ito chose for viewers who do not see red or green
("Color universal design", 2008)."""

SIDES = ("before", "after", "both")

Side = Literal["before", "after", "both"]
TouchKind = Literal["created", "replaced", "rewired", "erased", "applied", "missed"]

MARKS: Mapping[TouchKind, str] = {
    "created": "+",
    "replaced": "⇄",
    "rewired": "~",
    "erased": "−",
    "applied": "✓",
    "missed": "·",
}
"""A sign for each kind of touch."""


@dataclass(frozen=True)
class Touch:
    """What one pass did to one node, or that it considered it."""

    number: int
    """Which pass, counted from 0 in the order they ran."""
    kind: TouchKind
    """How the node changed; without a change of its own, what became of it as a candidate."""
    cause: str | None = None
    """The candidate whose rewrite changed the node."""


def touches_of(report: ReportRecord) -> dict[str, tuple[Touch, ...]]:
    """Return, for each node that a pass changed or considered, what happened to it, in order."""
    found: dict[str, dict[int, Touch]] = {}
    for number, entry in enumerate(report.passes):
        for remark in entry.remarks:
            if remark.node is not None:
                found.setdefault(remark.node, {})[number] = Touch(number, remark.kind)
        for change in entry.changes:
            found.setdefault(change.node, {})[number] = Touch(number, change.kind, change.cause)
    return {name: tuple(by_pass.values()) for name, by_pass in found.items()}


def changing(touches: Sequence[Touch]) -> Touch | None:
    """Return the last touch that changed a node, else the last that rewrote around it, else None."""
    changes = [touch for touch in touches if touch.kind not in ("applied", "missed")]
    rewrites = changes or [touch for touch in touches if touch.kind == "applied"]
    return rewrites[-1] if rewrites else None


def view_of(report: ReportRecord, side: Side) -> GraphView:
    """Return one of the graphs; for ``"both"`` the later one, with what is erased behind it.

    Raises:
        InputError: the report holds no graphs.
        OptionError: there is no such side.
    """
    before, after = report.graphs()
    if side not in SIDES:
        raise OptionError(f"graph: expected one of {', '.join(map(repr, SIDES))}, found {side!r}")
    if side != "both":
        return before if side == "before" else after
    order = united_order(before, after)
    nodes = tuple(after.by_name.get(name) or before.by_name[name] for name in order)
    return GraphView(nodes, {**before.modules, **after.modules})


def united_order(before: GraphView, after: GraphView) -> list[str]:
    """Return the nodes of both graphs in the later one's order, erased ones behind what they followed."""
    followers: dict[str | None, list[str]] = {}
    last: str | None = None
    for node in before.nodes:
        if node.name in after.by_name:
            last = node.name
        else:
            followers.setdefault(last, []).append(node.name)
    order = followers.get(None, [])
    for node in after.nodes:
        order += [node.name, *followers.get(node.name, ())]
    return order


def layout_of(before: GraphView, after: GraphView) -> Layout:
    """Return places that serve both graphs: a node stands at the same place in each.

    The later graph decides; of the earlier one's edges only those of erased nodes have a say.
    """
    edges = [(source, node.name) for node in after.nodes for source in node.inputs]
    for node in before.nodes:
        gone = node.name not in after.by_name
        edges += [(source, node.name) for source in node.inputs if gone or source not in after.by_name]
    inputs = [node.name for graph in (before, after) for node in graph.nodes if node.op == "placeholder"]
    return layered_layout(united_order(before, after), edges, inputs)
