"""Each change of a graph belongs to the candidate during whose rewrite it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import biofx
from biofx import BioGraphModule, Pass, Remark, Report, Scope, applied, missed


def chain() -> nn.Module:
    convolutions = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))


def perceptron() -> nn.Module:
    hidden = nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


class Tied(nn.Module):
    """Calls a layer twice, and another whose weight is an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.norm, self.inner, self.drop = nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.words.weight
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(self.norm(self.words(x))))
        x = torch.tanh(self.inner(self.drop(x))) + self.shift
        return self.head(x)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Has layers with several weights, and a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = (
            nn.LSTM(4, 4, batch_first=True),
            nn.MultiheadAttention(4, 2, batch_first=True),
        )
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        z, _ = self.attention(y, y, y)
        return self.down(torch.relu(self.up(z))) + z  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "perceptron": perceptron,
    "tied": Tied,
    "recurrent": Recurrent,
}
PASSES = (
    "split-weights",
    "split-weights{activation=torch.tanh}",
    "constrain-signs",
    "constrain-signs{axis=postsynaptic,constrain_inputs=true,constrain_readout=true}",
    "scale-gradients",
    "scale-gradients{parameters=all,dtype=bfloat16}",
    "scale-gradients{dtype=seed}",
    "observe-activity",
    "split-weights,constrain-signs,scale-gradients,observe-activity,fold-splits",
    "expand-units,constrain-signs{method=expand,constrain_readout=true}",
)


def causes(report: Report) -> Iterator[str]:
    for entry in report.passes:
        yield f"  {entry.text}"
        for change in entry.changes:
            yield f"    {change.kind:<8} {change.node} because of {change.cause}"


def test_the_cause_of_every_change_of_every_pass(golden: Callable[[str, str], None]) -> None:
    lines = []
    for name, make in MODELS.items():
        lines.append(name)
        for text in PASSES:
            lines += causes(biofx.transform(make(), passes=text).report)
    golden("causes", "\n".join(lines))


@pytest.mark.parametrize("text", PASSES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_cause_is_a_candidate_that_was_rewritten(make: Callable[[], nn.Module], text: str) -> None:
    report = biofx.transform(make(), passes=text).report
    assert report.remarks
    for entry in report.passes:
        rewritten = {remark.node for remark in entry.remarks if remark.kind == "applied"}
        assert {change.cause for change in entry.changes} <= rewritten
    assert all(change.cause for change in report.changes)


def test_what_observes_a_layer_is_because_of_that_layer() -> None:
    report = biofx.transform(chain(), passes="observe-activity").report
    found = {change.node: change.cause for change in report.changes if change.kind == "created"}
    assert found == {
        f"_{n}_{what}": f"_{n}" for n in (0, 3, 6, 8) for what in ("activity", "training", "observed")
    }


# by construction: whatever the rewrite of a candidate does to the graph, and in whatever way


@dataclass(frozen=True, kw_only=True)
class Change(Pass):
    """Do to each ``relu`` what a function does."""

    name: ClassVar[str] = "change"

    work: Callable[[Node], object]

    def candidates(self, graph_module: BioGraphModule) -> list[Node]:
        return list(graph_module.graph.find_nodes(op="call_function", target=torch.relu))

    def rewrite_node(self, candidate: Node, options: Pass) -> Remark:
        self.work(candidate)
        return applied(candidate, "", "changed")


class Branches(nn.Module):
    """Two branches that meet, each with a ``relu``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.exp(x)).sin() + torch.relu(torch.tanh(x)).cos()


def set_arguments(node: Node) -> None:
    (user,) = node.users
    user.args = node.args


def replace_input(node: Node) -> None:
    (user,) = node.users
    user.replace_input_with(node, node.all_input_nodes[0])


def replace_all_uses(node: Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])


def update_argument(node: Node) -> None:
    (user,) = node.users
    user.update_arg(0, node.all_input_nodes[0])


def erase(node: Node) -> None:
    replace_all_uses(node)
    node.graph.erase_node(node)


def replace_by_another(node: Node) -> None:
    with node.graph.inserting_after(node):
        made = node.graph.call_function(torch.sigmoid, node.args)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def skip_two(node: Node) -> None:
    """Leave what led up to the node without a user."""
    node.replace_all_uses_with(node.all_input_nodes[0].all_input_nodes[0])


def change_the_user(node: Node) -> None:
    (user,) = node.users
    user.op, user.target = "call_function", torch.abs


FIRST, SECOND = {"relu": "relu", "sin": "relu"}, {"relu_1": "relu_1", "cos": "relu_1"}
WORK: dict[Callable[[Node], object], dict[str, str]] = {
    set_arguments: FIRST | SECOND,
    replace_input: FIRST | SECOND,
    replace_all_uses: FIRST | SECOND,
    update_argument: FIRST | SECOND,
    erase: FIRST | SECOND,
    replace_by_another: FIRST | SECOND | {"sigmoid": "relu", "sigmoid_1": "relu_1"},
    skip_two: FIRST | SECOND | {"exp": "relu", "tanh": "relu_1"},
    change_the_user: {"sin": "relu", "cos": "relu_1"},
}


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_a_change_belongs_to_the_candidate_however_it_is_made(work: Callable[[Node], object]) -> None:
    report = Change(work=work)(biofx.capture(Branches())).report
    assert {change.node: change.cause for change in report.changes} == WORK[work]


def test_what_several_candidates_change_belongs_to_the_first() -> None:
    def work(node: Node) -> None:
        (end,) = node.graph.find_nodes(op="output")
        end.args = (node,)

    report = Change(work=work)(biofx.capture(Branches())).report
    found = {change.node: change.cause for change in report.changes}
    assert found["output"] == "relu"
    assert found["add"] == "relu"
    assert found["cos"] == "relu"


@dataclass(frozen=True, kw_only=True)
class WholeGraph(Pass):
    """Do what a function does with the whole graph."""

    name: ClassVar[str] = "whole-graph"

    work: Callable[[BioGraphModule, Scope], Iterator[Remark]]

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        return self.work(graph_module, scope)


def relus(graph_module: BioGraphModule) -> list[Node]:
    return list(graph_module.graph.find_nodes(op="call_function", target=torch.relu))


def test_in_a_rewrite_of_the_whole_graph_a_change_belongs_to_the_next_remark() -> None:
    def work(graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        for node in relus(graph_module):
            replace_by_another(node)
            yield missed(next(iter(graph_module.graph.nodes)), "", "left alone")
            yield applied(node, "", "replaced")

    report = WholeGraph(work=work)(biofx.capture(Branches())).report
    assert {change.node: change.cause for change in report.changes} == WORK[replace_by_another]


def test_in_a_rewrite_of_the_whole_graph_it_can_be_said_to_whom_a_change_belongs() -> None:
    def work(graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        nodes = relus(graph_module)
        yield from [applied(node, "", "replaced") for node in nodes]
        for node in reversed(nodes):
            with scope.rewriting(node):
                replace_by_another(node)

    report = WholeGraph(work=work)(biofx.capture(Branches())).report
    swapped = {"sigmoid": "relu_1", "sigmoid_1": "relu"}
    assert {change.node: change.cause for change in report.changes} == WORK[replace_by_another] | swapped


def test_recording_leaves_nothing_behind() -> None:
    result = Change(work=replace_by_another)(biofx.capture(Branches())).graph_module
    assert vars(result.graph._find_nodes_lookup_table).keys() == {"table"}
    assert result._replace_hooks == []
