"""Which nodes a selector picks, and what is said when it picks nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import biofx
from biofx import BioConfig, Pipeline, Report
from biofx.errors import SelectorError
from biofx.passes import ScaleGradients, SplitWeights
from biofx.select import Candidate, NodeIndex, Override, Selection, Selector, check_selector

OutProjection = nn.modules.linear.NonDynamicallyQuantizableLinear
"""A subclass of Linear that torch itself has, and therefore calls as a whole."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.a(x)))


class Net(nn.Module):
    """``fc`` is called twice, and the second call's node is called ``fc_1`` like another module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 4)
        self.fc_1 = OutProjection(4, 4)
        self.norm = nn.LayerNorm(4)
        self.spare = nn.Dropout()
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.fc(self.block(x)))
        return self.out(self.norm(self.fc_1(x)) + 1)  # type: ignore[no-any-return]


ALL_IN_BLOCK = ["block_0_a", "block_0_b", "relu", "block_1_a", "block_1_b", "relu_1"]
EVERYTHING = ["x", *ALL_IN_BLOCK, "fc", "fc_1", "fc_2", "norm", "add", "out", "output"]


@pytest.fixture(scope="module")
def index() -> NodeIndex:
    return NodeIndex(biofx.capture(Net()))


def picked(index: NodeIndex, selector: Selector) -> list[str]:
    nodes: set[Node] = set().union(*(match.nodes for match in index.matches(selector)))
    return [candidate.name for candidate in index.candidates if candidate.node in nodes]


def is_relu(candidate: Candidate) -> bool:
    return candidate.node.target is torch.relu


def test_the_nodes_of_the_example_are_these(index: NodeIndex) -> None:
    assert [candidate.name for candidate in index.candidates] == EVERYTHING


SELECTORS: dict[str, tuple[Selector, list[str]]] = {
    "path of a layer": ("block.0.a", ["block_0_a"]),
    "path of a container": ("block", ALL_IN_BLOCK),
    "path of a container inside": ("block.1", ALL_IN_BLOCK[3:]),
    "name of a node": ("add", ["add"]),
    "name of a node that is also a call of a layer": ("fc_2", ["fc_2"]),
    "name of an input": ("x", ["x"]),
    "path of a layer called twice": ("fc", ["fc", "fc_1"]),
    "path that is also the name of another layer's node": ("fc_1", ["fc_2"]),
    "first call": ("fc#0", ["fc"]),
    "second call": ("fc#1", ["fc_1"]),
    "only call of a container": ("block.0#0", ALL_IN_BLOCK[:3]),
    "glob over paths": ("block.?.a", ["block_0_a", "block_1_a"]),
    "glob across dots": ("block*a", ["block_0_a", "block_1_a"]),
    "glob over names": ("relu*", ["relu", "relu_1"]),
    "glob over both": ("fc*", ["fc", "fc_1", "fc_2"]),
    "glob with a set": ("block.[0].*", ["block_0_a", "block_0_b"]),
    "glob over everything": ("*", EVERYTHING),
    "expression over paths": (r"re:block\.\d\.b", ["block_0_b", "block_1_b"]),
    "expression over names": (r"re:relu(_\d)?", ["relu", "relu_1"]),
    "expression that must match whole": (r"re:ad.", ["add"]),
    "class name": ("type:LayerNorm", ["norm"]),
    "name of a base class": (
        "type:Linear",
        ["block_0_a", "block_0_b", "block_1_a", "block_1_b", "fc", "fc_1", "fc_2", "out"],
    ),
    "name of a subclass": ("type:NonDynamicallyQuantizableLinear", ["fc_2"]),
    "full class name": ("type:torch.nn.modules.normalization.LayerNorm", ["norm"]),
    "class": (OutProjection, ["fc_2"]),
    "class of a container": (Block, ALL_IN_BLOCK),
    "predicate": (is_relu, ["relu", "relu_1"]),
    "list": (["add", "fc#1", OutProjection, is_relu], ["relu", "relu_1", "fc_1", "fc_2", "add"]),
    "tuple": (("add", "norm"), ["norm", "add"]),
    "empty list": ([], []),
}


@pytest.mark.parametrize(("selector", "expected"), SELECTORS.values(), ids=SELECTORS)
def test_a_selector_picks(index: NodeIndex, selector: Selector, expected: list[str]) -> None:
    assert picked(index, selector) == expected


def test_a_container_called_twice_has_its_calls_counted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))  # type: ignore[no-any-return]

    index = NodeIndex(biofx.capture(Twice()))
    assert picked(index, "block#0") == ["block_a", "block_b", "relu"]
    assert picked(index, "block#1") == ["block_a_1", "block_b_1", "relu_1"]
    assert picked(index, "block.a#1") == ["block_a_1"]


def test_a_layer_that_is_never_called_is_picked_by_its_path(index: NodeIndex) -> None:
    match = index.match("spare")
    assert (match.nodes, match.paths) == (frozenset(), frozenset({"spare"}))


def test_a_path_picks_the_paths_below_it_too(index: NodeIndex) -> None:
    assert index.match("block.0").paths == {"block.0", "block.0.a", "block.0.b"}


def test_a_predicate_sees_node_path_call_and_module(index: NodeIndex) -> None:
    seen: dict[str, tuple[str, int, type[nn.Module]]] = {}

    def note(candidate: Candidate) -> bool:
        seen[candidate.name] = (candidate.path, candidate.call, type(candidate.module))
        return True

    index.match(note)
    assert list(seen) == EVERYTHING
    assert seen["fc_1"] == ("fc", 1, nn.Linear)
    assert seen["relu_1"] == ("block.1", 0, Block)
    assert seen["add"] == ("", 0, type(index.graph_module))


NOTHING: dict[str, tuple[Selector, str]] = {
    "misspelt path": ("block.0.c", "selector 'block.0.c' matches nothing; did you mean 'block.0"),
    "misspelt name": ("addd", "selector 'addd' matches nothing; did you mean 'add'?"),
    "misspelt class": (
        "type:LayerNrom",
        "selector 'type:LayerNrom' matches nothing; did you mean 'LayerNorm'",
    ),
    "class": (nn.Conv2d, "selector 'type:torch.nn.modules.conv.Conv2d' matches nothing"),
    "glob": ("blok.0.*", "selector 'blok.0.*' matches nothing; did you mean 'block.0"),
    "expression": ("re:add.", "selector 're:add.' matches nothing"),
    "call": (
        "fc#2",
        "selector 'fc#2' matches nothing: 'fc' is called 2 times in this graph, counted from 0; "
        "there is no call 2",
    ),
    "call of a layer never called": ("spare#0", "'spare' is called 0 times in this graph"),
    "odd call": ("fc#²", "selector 'fc#²' matches nothing: 'fc' is called 2 times"),
    "far from anything": (
        "zzzzzz",
        "matches nothing; 'biofx explain' and biofx.format_graph show the names there are",
    ),
    "predicate": (lambda candidate: False, "selector <lambda> matches nothing"),
    "one of a list": (["add", "nrom"], "selector 'nrom' matches nothing; did you mean 'norm'?"),
}


@pytest.mark.parametrize(("selector", "message"), NOTHING.values(), ids=NOTHING)
def test_a_selector_that_picks_nothing_is_an_error_that_names_what_is_near(
    index: NodeIndex, selector: Selector, message: str
) -> None:
    with pytest.raises(SelectorError) as caught:
        index.matches(selector)
    assert message in str(caught.value)


@pytest.mark.parametrize("selector", [3, None, "", ["fc", 3], [["fc"]], [""], {"fc"}, b"fc"])
def test_what_is_no_selector_is_refused(selector: Any) -> None:
    with pytest.raises(SelectorError, match=r"a selector is a name, a glob, .* found "):
        check_selector(selector)


def test_a_malformed_expression_is_refused() -> None:
    with pytest.raises(SelectorError, match=r"selector 're:\[a' is not a regular expression: unterminated"):
        check_selector("re:[a")


def test_a_checked_selector_is_plain() -> None:
    assert check_selector(["fc", Block]) == ("fc", f"type:{__name__}.Block")


def test_near_names_come_nearest_first(index: NodeIndex) -> None:
    assert index.near("block.0.x")[:2] == ["block.0.b", "block.0.a"]
    assert index.near(["nrom", is_relu]) == ["norm"]


def test_a_selection_says_why_a_node_is_out(index: NodeIndex) -> None:
    selection = Selection.of(index, ["block", is_relu], ["block.1"])
    nodes = {candidate.name: candidate.node for candidate in index.candidates}
    assert selection.why_not(nodes["block_0_a"], "block.0.a") is None
    assert selection.why_not(nodes["block_1_a"], "block.1.a") == "excluded by 'block.1'"
    assert selection.why_not(nodes["fc"], "fc") == "not selected by only=['block', 'is_relu']"
    assert selection.why_not(None, "spare") == "not selected by only=['block', 'is_relu']"


# what selections mean to a pass


def scale(**options: Any) -> ScaleGradients:
    return ScaleGradients(nu=0.1, **options)


def applied(report: Report) -> list[str | None]:
    return [remark.node for remark in report.remarks if remark.kind == "applied"]


def reasons(report: Report) -> dict[str | None, str]:
    return {remark.node: remark.message for remark in report.remarks if remark.kind == "missed"}


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


Front = Callable[..., Report]


@pytest.mark.parametrize(
    "front",
    [
        lambda net, **given: biofx.transform(net, passes=scale(), **given).report,
        lambda net, **given: biofx.transform(net, passes=scale(**given)).report,
        lambda net, **given: biofx.transform(net, passes=Pipeline((scale(),), **given)).report,
        lambda net, **given: scale(**given)(biofx.capture(net)).report,
    ],
    ids=["transform", "pass", "pipeline", "call"],
)
def test_only_and_exclude_work_together_wherever_they_are_given(net: nn.Module, front: Front) -> None:
    report = front(net, only=["block", "out"], exclude="block.*.b")
    assert applied(report) == ["block_0_a", "block_1_a", "out"]
    assert reasons(report) == {
        "block_0_b": "excluded by 'block.*.b'",
        "block_1_b": "excluded by 'block.*.b'",
        **dict.fromkeys(["fc", "fc_1", "fc_2"], "not selected by only=['block', 'out']"),
    }


def test_nested_selections_intersect(net: nn.Module) -> None:
    inner = Pipeline((scale(exclude="block.0.a"),), only=["block.0", "fc"])
    report = biofx.transform(net, passes=inner, only="block").report
    assert applied(report) == ["block_0_b"]
    said = reasons(report)
    assert said["block_0_a"] == "excluded by 'block.0.a'"
    assert said["block_1_a"] == "not selected by only=['block.0', 'fc']"
    assert said["fc"] == "not selected by only=['block']"


def test_an_empty_list_selects_nothing_and_every_candidate_says_so(net: nn.Module) -> None:
    report = biofx.transform(net, passes=scale(), only=[]).report
    assert not report.modified
    assert reasons(report) == dict.fromkeys(
        ["block_0_a", "block_0_b", "block_1_a", "block_1_b", "fc", "fc_1", "fc_2", "out"],
        "not selected by only=[]",
    )


def test_one_call_of_a_layer_can_be_selected(net: nn.Module) -> None:
    bio, report = biofx.transform(net, passes=scale(only="fc#1"))
    assert applied(report) == ["fc_1"]
    called = [node.name for node in bio.graph.nodes if node.op == "call_module" and node.target == "fc"]
    assert called == ["fc"]


def test_the_module_path_wins_over_the_node_of_the_same_name(net: nn.Module) -> None:
    report = biofx.transform(net, passes=scale(only="fc_1")).report
    assert [(remark.node, remark.layer) for remark in report.remarks if remark.kind == "applied"] == [
        ("fc_2", "fc_1")
    ]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("norm", "only='norm' picks 1 nodes, none of which scale-gradients acts on"),
        ("x", "only='x' picks 1 nodes, none of which scale-gradients acts on"),
        (is_relu, "only=is_relu picks 2 nodes, none of which scale-gradients acts on"),
        (functools.partial(lambda _, c: c.name == "add", None), "only=partial picks 1 nodes, none of which"),
        ("spare", "only='spare' picks 1 modules, never called, none of which scale-gradients acts on"),
    ],
)
def test_a_selected_node_that_is_no_candidate_yields_a_remark(
    net: nn.Module, only: Selector, expected: str
) -> None:
    report = biofx.transform(
        net, passes=scale(), only=["fc", only] if callable(only) else ["fc", str(only)]
    ).report
    assert applied(report) == ["fc", "fc_1"]
    idle = [remark for remark in report.remarks if "picks" in remark.message]
    assert len(idle) == 1
    assert idle[0].kind == "missed"
    assert idle[0].message.startswith(expected)


def test_a_pattern_that_reaches_a_candidate_yields_no_such_remark(net: nn.Module) -> None:
    report = biofx.transform(net, passes=scale(), only=["block", "*"]).report
    assert not [remark for remark in report.remarks if "picks" in remark.message]


@pytest.mark.parametrize("place", ["transform", "exclude", "pass", "override", "config"])
def test_a_pattern_that_matches_nothing_is_an_error_wherever_it_stands(
    net: nn.Module, place: str, unchanged: Callable[[nn.Module], Any]
) -> None:
    given: dict[str, dict[str, Any]] = {
        "transform": {"only": "fcc"},
        "exclude": {"exclude": "fcc"},
        "pass": {"passes": scale(only="fcc")},
        "override": {"passes": scale(overrides=(Override("fcc", (("nu", 0.2),)),))},
        "config": {"config": BioConfig().override("fcc", dales_method="abs")},
    }
    with unchanged(net), pytest.raises(SelectorError, match="'fcc' matches nothing; did you mean 'fc'"):
        biofx.transform(net, **given[place])


def test_the_last_matching_override_wins_and_enabled_switches_off(net: nn.Module) -> None:
    overrides = (
        Override("block", (("gamma", 4),)),
        Override("block.1", (("gamma", 1),)),
        Override("type:NonDynamicallyQuantizableLinear", (("enabled", False),)),
        Override("fc#1", (("enabled", False),)),
    )
    report = biofx.transform(net, passes=SplitWeights(overrides=overrides)).report
    gammas = {remark.node: remark.details["gamma"] for remark in report.remarks if remark.kind == "applied"}
    assert gammas == {"block_0_a": 4, "block_0_b": 4, "fc": 2}
    said = reasons(report)
    assert {said[name].partition(";")[0] for name in ("block_1_a", "block_1_b")} == {
        "it is off (gamma=1, in a config weight_splitting_Gamma)"
    }
    assert {said[name].partition(";")[0] for name in ("fc_1", "fc_2")} == {
        "switched off here (enabled=False)"
    }


def test_an_override_can_switch_a_pass_on(net: nn.Module) -> None:
    disabled = scale(enabled=False, overrides=(Override("out", (("enabled", True), ("nu", 0.3))),))
    report = biofx.transform(net, passes=disabled).report
    assert applied(report) == ["out"]
    assert report.remarks[-1].details["std"] > 0.1


def test_overrides_of_different_options_add_up(net: nn.Module) -> None:
    overrides = (Override("block", (("nu", 0.0),)), Override("block.0.a", (("distribution", "normal"),)))
    said = reasons(biofx.transform(net, passes=scale(overrides=overrides)).report)
    assert said["block_0_a"] == "every factor would be 1 (normal, nu=0)"
    assert said["block_1_b"] == "every factor would be 1 (uniform, nu=0)"


def test_a_candidate_is_a_frozen_record(index: NodeIndex) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        index.candidates[0].module = nn.ReLU()  # type: ignore[misc]


def test_an_override_that_picks_no_candidate_of_the_pass_is_remarked(mlp: nn.Module) -> None:
    config = BioConfig(weight_splitting_Gamma=2).override("1", weight_splitting_Gamma=3)
    _, report = biofx.transform(mlp, config, passes="split-weights")
    told = [remark.message for remark in report.remarks if remark.layer == "1"]
    assert told == ["override='1' picks 1 nodes, none of which split-weights acts on"]


def test_a_container_that_is_never_called_picks_what_lies_in_it() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)  # type: ignore[no-any-return]

    index = NodeIndex(biofx.capture(Listed()))
    for pattern in ("blocks", "block?", "re:blocks", "type:ModuleList", nn.ModuleList):
        assert {node.name for node in index.match(pattern).nodes} == {"blocks_0", "blocks_1"}


class RateNetwork(nn.Module):
    """Reads weights of its own, whose nodes have other names than the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.randn(6, 3))
        self.W_rec = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.relu(x @ self.W_in.t())
        for _ in range(2):
            state = torch.relu(state @ self.W_rec.t() + x @ self.W_in.t())
        return state


def test_a_parameter_that_the_forward_reads_is_picked_by_its_own_path() -> None:
    index = NodeIndex(biofx.capture(RateNetwork()))
    (match,) = index.matches("W_rec")
    assert {(node.op, node.target) for node in match.nodes} == {("get_attr", "W_rec")}
    with pytest.raises(SelectorError, match="'W_rce' matches nothing; did you mean 'W_rec'"):
        index.match("W_rce")


def test_an_override_reaches_a_parameter_of_a_loop_by_its_path() -> None:
    class Loop(RateNetwork):
        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(x.shape[1], 6)
            for step in x:
                state = torch.relu(state @ self.W_rec.t() + step @ self.W_in.t())
            return state

    config = BioConfig(apply_dales_principle=True, fuzzy_lr_distribution=biofx.Distribution.BASELINE)
    signs = [1, 1, 1, 1, 1, -1]
    bio_model, _ = biofx.transform(
        Loop(), config.override("W_rec", dales_signs=signs), example_inputs=(torch.randn(4, 2, 3),)
    )
    weight = biofx.deploy(bio_model).get_parameter("W_rec")
    assert bool((weight * torch.tensor(signs) >= 0).all())
    assert bool((weight[:, 5] < 0).any())
