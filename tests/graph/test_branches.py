"""Branches of a graph: what their code is, what moves out of them, and one mode alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from biofx.errors import PassError
from biofx.graph.branches import (
    begin_branch,
    branch_of_nodes,
    end_branch,
    settle_branches,
    take_branches,
    with_branches,
)
from biofx.graph.guards import by_mode
from biofx.model.graph_module import BioGraphModule


def graph_with_a_branch(*, read_outside: bool) -> tuple[Graph, dict[str, Node]]:
    """Return ``sin(x)``, in training ``cos(sin(x))``; or its cosine besides in both modes."""
    graph = Graph()
    x = graph.placeholder("x")
    flag = graph.get_attr("training")
    sine = graph.call_function(torch.sin, (x,))
    begin = graph.call_function(begin_branch, (flag, True))
    half = graph.call_function(torch.mul, (sine, 0.5))
    cosine = graph.call_function(torch.cos, (half,))
    graph.call_function(end_branch, (begin,))
    chosen = graph.call_function(by_mode, (flag, cosine, sine))
    out = graph.call_function(torch.add, (chosen, cosine)) if read_outside else chosen
    graph.output(out)
    return graph, {"half": half, "cosine": cosine, "begin": begin, "flag": flag}


def module_of(graph: Graph) -> BioGraphModule:
    root = nn.Module()
    return BioGraphModule.from_root(root, graph, "Model")


def test_a_branch_runs_in_its_mode_alone() -> None:
    graph, nodes = graph_with_a_branch(read_outside=False)
    calls = []

    def counted(value: Tensor) -> Tensor:
        calls.append(1)
        return torch.cos(value)

    nodes["cosine"].target = counted
    module = module_of(graph)
    x = torch.randn(3)
    torch.testing.assert_close(module.train()(x), torch.cos(0.5 * torch.sin(x)))
    assert len(calls) == 1
    torch.testing.assert_close(module.eval()(x), torch.sin(x))
    assert len(calls) == 1


def test_what_is_read_outside_moves_out_with_what_it_reads() -> None:
    graph, nodes = graph_with_a_branch(read_outside=True)
    module = module_of(graph)
    assert not {nodes["half"], nodes["cosine"]} & branch_of_nodes(module.graph).keys()
    x = torch.randn(3)
    cosine = torch.cos(0.5 * torch.sin(x))
    torch.testing.assert_close(module.train()(x), 2 * cosine)
    torch.testing.assert_close(module.eval()(x), torch.sin(x) + cosine)


def test_what_could_not_run_in_both_modes_is_refused() -> None:
    graph, nodes = graph_with_a_branch(read_outside=True)
    nodes["cosine"].op, nodes["cosine"].target = "call_method", "cos_"
    with pytest.raises(PassError, match="'cos' runs in one mode only, and is read in the other too"):
        settle_branches(graph)


@pytest.mark.parametrize("training", [True, False])
def test_one_mode_alone(training: bool) -> None:
    graph, _ = graph_with_a_branch(read_outside=False)
    take_branches(graph, training=training)
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == ([torch.sin, torch.mul, torch.cos] if training else [torch.sin])


def test_the_code_of_a_branch_is_an_if() -> None:
    body = ["a = f(x)\n", "b = my_begin_branch(flag, False);  flag = None\n", "a += x;  c = a;  a = None\n"]
    body += ["d = g(c)\n", "e = my_end_branch(b);  b = None\n", "return my_by_mode(flag, x, c)\n"]
    assert "".join(with_branches(body)).split("\n") == [
        *("a = f(x)", "c = None", "if not flag:", "    a += x;  c = a;  a = None", "    d = g(c)"),
        *("return my_by_mode(flag, x, c)", ""),
    ]


def test_an_empty_branch_is_code_too() -> None:
    graph, nodes = graph_with_a_branch(read_outside=False)
    for user in list(nodes["cosine"].users):
        user.replace_input_with(nodes["cosine"], nodes["flag"])
    for name in ("cosine", "half"):
        graph.erase_node(nodes[name])
    assert "    pass" in module_of(graph).code
