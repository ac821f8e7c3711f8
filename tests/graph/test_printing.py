"""Graphs and their differences as text."""

from __future__ import annotations

import io
import operator
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import biofx
from biofx import format_graph
from biofx.graph import diff_graphs
from biofx.graph.changes import print_changed, render_diff
from biofx.graph.printing import function_name


class Pair(NamedTuple):
    """A result with named parts."""

    first: object
    second: object


class Many(nn.Module):
    """Something of each form that a node can take."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor, *, scale: float = 2.0) -> object:
        a = self.block(x) + self.weight
        a = a - 1 if scale is None else a * scale
        a = (a / 2 // 3) ** 2 % 5 @ self.weight
        a += y
        b = -a[0] + a[..., 1:2, None] + a[:, ::2] + a[y]
        c = torch.cat([a, y], dim=-1).to(torch.float64).view(-1, 2).size()
        d = nn.functional.dropout(b, 0.5, training=self.training)
        e = torch.where(d > self.offset, d, d.mean((0,), keepdim=True))
        f = torch.zeros(3, dtype=torch.int64, device=torch.device("cpu"))
        return {"e": (e, None), "f": [f, Pair(c, d.shape)]}, d == e


def test_each_form_of_a_node_reads_as_in_python(golden: Callable[[str, str], None]) -> None:
    golden("test_printing_forms", format_graph(biofx.capture(Many())))


def test_a_rewritten_graph_shows_its_weight_expressions(
    residual_net: nn.Module, golden: Callable[[str, str], None]
) -> None:
    config = biofx.BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)
    golden("test_printing_rewritten", format_graph(biofx.transform(residual_net, config).graph_module))


def test_there_is_one_line_for_each_node(residual_net: nn.Module) -> None:
    captured = biofx.capture(residual_net)
    lines = format_graph(captured).splitlines()
    assert [line.partition(" = ")[0] for line in lines[:-1]] == [n.name for n in captured.graph.nodes][:-1]
    assert lines[-1].startswith("return ")


def test_a_graph_reads_like_its_module_where_no_path_needs_one() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.add, (x, 1)))
    assert (
        format_graph(graph)
        == format_graph(GraphModule(nn.Module(), graph))
        == "x = input\nadd = x + 1\nreturn add"
    )


def test_the_text_is_the_same_after_copying_and_recapturing(mlp: nn.Module) -> None:
    once = biofx.transform(mlp, passes="scale-gradients").graph_module
    again = biofx.transform(mlp, passes="scale-gradients").graph_module
    assert format_graph(once) == format_graph(again) == format_graph(biofx.capture(once))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.relu, "relu"),
        (nn.functional.conv2d, "conv2d"),
        (torch.ops.aten.add.Tensor, "add.Tensor"),
        ("view", "view"),
    ],
)
def test_a_function_goes_by_its_short_name(function: Callable[..., object] | str, name: str) -> None:
    assert function_name(function) == name


OLD = "a\nb\nc\nd\ne\nf\ng"


def test_equal_graphs_have_an_empty_diff(mlp: nn.Module) -> None:
    captured = biofx.capture(mlp)
    assert diff_graphs(captured, captured) == ""
    assert diff_graphs(captured, captured.graph) == diff_graphs(captured, format_graph(captured)) == ""


@pytest.mark.parametrize(
    ("new", "context", "expected"),
    [
        (
            "a\nb\nc\nX\ne\nf\ng",
            1,
            ["  … 2 unchanged lines", "  c", "- d", "+ X", "  e", "  … 2 unchanged lines"],
        ),
        ("a\nb\nc\nX\ne\nf\ng", 2, ["  a", "  b", "  c", "- d", "+ X", "  e", "  f", "  g"]),
        ("a\nb\nc\nX\ne\nf\ng", 0, ["  … 3 unchanged lines", "- d", "+ X", "  … 3 unchanged lines"]),
        ("X\nb\nc\nd\ne\nf\nY", 1, ["- a", "+ X", "  b", "  … 3 unchanged lines", "  f", "- g", "+ Y"]),
        ("X\nb\nc\nd\ne\nf\nY", 2, ["- a", "+ X", "  b", "  c", "  d", "  e", "  f", "- g", "+ Y"]),
        ("a\nb\nc\nd\ne\nf\ng\nh", 1, ["  … 6 unchanged lines", "  g", "+ h"]),
        ("b\nc\nd\ne\nf\ng", 1, ["- a", "  b", "  … 5 unchanged lines"]),
        ("", 1, [f"- {line}" for line in "abcdefg"]),
    ],
)
def test_unchanged_stretches_are_folded(new: str, context: int, expected: list[str]) -> None:
    assert diff_graphs(OLD, new, context=context).splitlines() == expected


def test_a_diff_holds_every_line_that_differs(residual_net: nn.Module) -> None:
    before = biofx.capture(residual_net)
    after = biofx.transform(residual_net, biofx.BioConfig(weight_splitting_Gamma=2)).graph_module
    lines = diff_graphs(before, after).splitlines()
    old, new = format_graph(before).splitlines(), format_graph(after).splitlines()
    assert [line[2:] for line in lines if line.startswith("- ")] == [line for line in old if line not in new]
    assert [line[2:] for line in lines if line.startswith("+ ")] == [line for line in new if line not in old]


def test_a_rendered_diff_is_coloured_and_says_when_there_is_none() -> None:
    text = render_diff(diff_graphs("a\nb\nc\nd", "a\nb\nc\nX"))
    assert text.plain == "  … 2 unchanged lines\n  c\n- d\n+ X"
    assert [str(span.style) for span in text.spans] == ["dim", "red", "green"]
    assert render_diff("").plain == "(the graph is unchanged)"


def test_names_of_users_are_not_taken_for_markup() -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    print_changed("p{only=[red]}", "x = [bold]y[/bold]", "x = [/red]", console=console)
    shown = console.export_text()
    assert "after p{only=[red]}" in shown
    assert "- x = [bold]y[/bold]\n+ x = [/red]" in shown


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    line = "x = cat([" + ", ".join(f"value_{number}" for number in range(40)) + "])"
    print_changed("p", "x = input", line)
    assert f"+ {line}\n" in capsys.readouterr().out
