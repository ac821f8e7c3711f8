"""Branches of a graph: what their code is, what moves out of them, and one mode alone."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from biofx.errors import PassError
from biofx.graph.branches import (
    BranchCodeGen,
    begin_branch,
    branch_of_nodes,
    by_mode,
    end_branch,
    hoist_shared_nodes,
    take_branches,
)
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
        hoist_shared_nodes(graph)


@pytest.mark.parametrize("training", [True, False])
def test_one_mode_alone(training: bool) -> None:
    graph, _ = graph_with_a_branch(read_outside=False)
    take_branches(graph, training=training)
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == ([torch.sin, torch.mul, torch.cos] if training else [torch.sin])


def test_the_code_of_a_branch_is_an_if() -> None:
    graph = Graph()
    x, flag = graph.placeholder("x"), graph.get_attr("training")
    a = graph.call_function(torch.sin, (x,))
    begin = graph.call_function(begin_branch, (flag, False))
    c = graph.call_function(operator.iadd, (a, x))
    graph.call_function(torch.cos, (c,))
    graph.call_function(end_branch, (begin,))
    graph.output(graph.call_function(by_mode, (flag, x, c)))
    assert module_of(graph).code.strip().splitlines()[1:] == [
        *("    training = self.training", "    sin = torch.sin(x)"),
        *("    iadd = None", "    if not training:", "        sin += x;  iadd = sin;  sin = None"),
        "        cos = torch.cos(iadd);  cos = None",
        "    by_mode = biofx_graph_branches_by_mode(training, x, iadd);  training = x = iadd = None",
        "    return by_mode",
    ]


def test_what_others_do_to_the_code_is_done_to_that_of_branches() -> None:
    graph, _ = graph_with_a_branch(read_outside=False)
    module = module_of(graph)
    with module.graph.on_generate_code(lambda before: lambda body: ["first = 1\n", *body]):
        module.recompile()
    assert module.code.index("first = 1") < module.code.index("if training:")
    module.recompile()
    assert "first = 1" not in module.code
    assert "if training:" in module.code


def test_copies_and_pickles_keep_the_code_of_branches() -> None:
    graph, _ = graph_with_a_branch(read_outside=False)
    module = module_of(graph)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.code == module.code
        assert isinstance(copied.graph._codegen, BranchCodeGen)
        copied.recompile()
        assert copied.code == module.code


def test_an_empty_branch_is_code_too() -> None:
    graph, nodes = graph_with_a_branch(read_outside=False)
    for user in list(nodes["cosine"].users):
        user.replace_input_with(nodes["cosine"], nodes["flag"])
    for name in ("cosine", "half"):
        graph.erase_node(nodes[name])
    assert "    pass" in module_of(graph).code
