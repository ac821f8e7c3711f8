from __future__ import annotations

from torch import nn

import biofx
from biofx import BioConfig
from biofx.graph.graph_view import GraphView, NodeView
from biofx.rewriting.views.drawing import Touch, layout_of, touches_of, united_order, view_of

FULL = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)


def view(*names: str) -> GraphView:
    return GraphView(tuple(NodeView(name, "call_function", "f", name, (), ()) for name in names), {})


def test_what_touched_a_node_is_told_pass_by_pass(mlp: nn.Module) -> None:
    touches = touches_of(biofx.transform(mlp, FULL).report)
    assert touches["_0"] == (
        *(Touch(0, "applied"), Touch(1, "missed")),
        *(Touch(2, "replaced", "_0"), Touch(3, "rewired", "_0")),
    )
    assert touches["_0_pooled"] == (Touch(0, "created", "_0"), Touch(3, "erased", "_0_pooled"))
    assert touches["_2_weight"] == (Touch(1, "created", "_2"),)
    assert "input_1" not in touches


def test_both_graphs_in_one_order_with_what_is_gone_behind_what_it_followed() -> None:
    assert united_order(view("x", "a", "b", "y"), view("x", "n", "y")) == ["x", "a", "b", "n", "y"]
    assert united_order(view("a", "x"), view("x", "n")) == ["a", "x", "n"]
    assert united_order(view(), view("x")) == ["x"]
    assert united_order(view("x"), view()) == ["x"]


def test_a_node_stands_at_one_place_in_both_graphs(mlp: nn.Module) -> None:
    report = biofx.transform(mlp, FULL).report
    assert report.before is not None
    assert report.after is not None
    layout = layout_of(report.before, report.after)
    assert set(layout.places) == {node.name for node in (*report.before.nodes, *report.after.nodes)}
    taken = [(round(x, 2), row) for x, row in layout.places.values()]
    assert len(set(taken)) == len(taken)
    assert view_of(report, "both").nodes == report.after.nodes  # nothing was erased
