from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import biofx
from biofx import BioConfig, Report
from biofx.errors import InputError
from biofx.graph.graph_view import GraphView, NodeView

FULL = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)


def parsed(text: str) -> Any:
    pydot = pytest.importorskip("pydot")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydot's own calls of pyparsing's old names
        (graph,) = pydot.graph_from_dot_data(text)
    return graph


def inside(graph: Any) -> dict[str, str]:
    """Return the nodes of a graph and of its clusters, with the cluster each lies in."""
    found = {node.get_name().strip('"'): graph.get_name() for node in graph.get_nodes()}
    for cluster in graph.get_subgraphs():
        found |= inside(cluster)
    return {name: where for name, where in found.items() if name not in ("node", "edge")}


def test_the_text_for_graphviz(golden: Callable[[str, str], None]) -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    report = biofx.transform(nn.Sequential(block, nn.Linear(2, 1)), passes="split-weights").report
    golden("test_report_dot", report.to_dot())


def test_it_reads_back_with_every_node_and_edge(residual_net: nn.Module, tmp_path: Path) -> None:
    report = biofx.transform(residual_net, FULL).report
    text = report.to_dot(tmp_path / "graph.dot")
    assert (tmp_path / "graph.dot").read_text(encoding="utf-8") == text
    graph = parsed(text)
    assert report.after is not None
    assert set(inside(graph)) == {node.name for node in report.after.nodes}
    edges = {(edge.get_source().strip('"'), edge.get_destination().strip('"')) for edge in graph.get_edges()}
    assert edges == {(source, node.name) for node in report.after.nodes for source in node.inputs}
    assert inside(graph)["stem_weight"] == '"cluster_/stem"'
    assert inside(parsed(report.to_dot(graph="before")))["stem"] != '"cluster_/stem"'


def test_names_with_quotes_and_backslashes_stay_names() -> None:
    model = nn.Sequential()
    model.add_module("a]; x [label='y", nn.Linear(2, 2))
    report = biofx.transform(model).report
    assert report.after is not None
    graph = parsed(report.to_dot())
    assert set(inside(graph)) == {node.name for node in report.after.nodes}
    label = inside(graph)[next(node.name for node in report.after.nodes if node.op == "get_attr")]
    assert label == '"cluster_/a]; x [label=\'y"'


def test_quotation_marks_and_backslashes_end_no_string() -> None:
    # capture refuses such names; what is put together by hand may hold them
    path = 'a\\n"]; x [label="y'
    names = ('p"', "q\\")
    nodes = tuple(NodeView(name, "get_attr", 'w"\\', 'self."\\', (), ((path, 0),)) for name in names)
    view = GraphView(nodes, {})
    graph = parsed(Report('N"\\', (), (), view, view).to_dot())
    (cluster,) = graph.get_subgraphs()
    assert cluster.get_name() == '"cluster_/a\\\\n\\"]; x [label=\\"y"'
    assert [node.get_name() for node in cluster.get_nodes()] == ['"p\\""', '"q\\\\"']
    assert cluster.get_nodes()[0].get_tooltip() == '"self.\\"\\\\"'


def test_a_report_without_graphs_is_refused() -> None:
    with pytest.raises(InputError, match="holds none"):
        Report("Net", (), ()).to_dot()
