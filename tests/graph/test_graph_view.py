from __future__ import annotations

import pickle

import torch
from torch import Tensor, nn

import biofx
from biofx.graph.graph_view import GraphView, ModuleView, NodeView


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.out.weight = self.embed.weight
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.out(self.embed(x)) + x).flatten(1)


def test_a_view_holds_every_node_with_inputs_calls_and_words() -> None:
    view = GraphView.of(biofx.capture(Tied()))
    assert view.nodes[1] == NodeView(
        "embed", "call_module", "Linear", "embed = self.embed(x)  # Linear", ("x",), (("embed", 0),)
    )
    assert [(node.name, node.what) for node in view.nodes] == [
        ("x", "input"),
        ("embed", "Linear"),
        ("out", "Linear"),
        ("add", "add"),
        ("relu", "relu"),
        ("flatten", "flatten"),
        ("output", "output"),
    ]
    assert view.by_name["add"].inputs == ("out", "x")


def test_modules_have_the_names_of_their_classes_and_shared_weights_count_once() -> None:
    view = GraphView.of(biofx.capture(Tied()))
    assert list(view.modules) == ["", "embed", "out", "spare"]
    assert view.modules["embed"].classes[:2] == ("Linear", "torch.nn.modules.linear.Linear")
    assert view.modules["embed"].classes[-2:] == ("object", "builtins.object")
    counts = {path: module.parameters for path, module in view.modules.items()}
    assert counts == {"": 0, "embed": 9, "out": 3, "spare": 6}


def test_a_report_keeps_both_graphs_as_they_were(mlp: nn.Module) -> None:
    captured = biofx.capture(mlp)
    bio, report = biofx.transform(mlp)
    assert report.before is not None
    assert report.after is not None
    assert "\n".join(node.line for node in report.before.nodes) == biofx.format_graph(captured)
    assert "\n".join(node.line for node in report.after.nodes) == biofx.format_graph(bio)
    assert report.after.by_name["_0_weight"].what == "weight"
    again = pickle.loads(pickle.dumps(report))
    assert (again.before, again.after) == (report.before, report.after)


def test_a_pipeline_of_no_pass_leaves_one_graph(mlp: nn.Module) -> None:
    report = biofx.transform(mlp, passes=biofx.Pipeline(())).report
    assert report.before is report.after is not None


def test_the_kind_of_a_module_is_the_short_name_of_its_class() -> None:
    assert ModuleView(("Linear", "torch.nn.modules.linear.Linear"), 0).kind == "Linear"
