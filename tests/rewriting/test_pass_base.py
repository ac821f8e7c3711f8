"""What every pass owes its caller, and what the library owes every pass."""

from __future__ import annotations

import copy
import dataclasses
import operator
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

import biofx
from biofx import BioGraphModule, OptionError, Pass, PassResult, Pipeline, Remark, Scope, passes
from biofx.errors import InputError, PassError, SelectorError
from biofx.rewriting import available_passes
from biofx.rewriting.remarks import applied, missed
from biofx.select import Override


@dataclass(frozen=True, kw_only=True)
class ReplaceRelu(Pass):
    """Turn ``relu`` into another function."""

    name: ClassVar[str] = "replace-relu"

    function: Callable[..., Any] = torch.tanh

    def candidates(self, graph_module: BioGraphModule) -> list[Node]:
        return list(graph_module.graph.find_nodes(op="call_function", target=torch.relu))

    def rewrite_node(self, candidate: Node, options: ReplaceRelu) -> Remark:
        candidate.target = options.function
        return applied(candidate, "", "replaced")


@dataclass(frozen=True, kw_only=True)
class Scripted(Pass):
    """Do what a function does."""

    name: ClassVar[str] = "scripted"

    work: Callable[[BioGraphModule], Iterator[Remark]]
    ensured: Callable[[GraphModule], None] = lambda graph_module: None
    required: Callable[[GraphModule], None] = lambda graph_module: None

    def requires(self, graph_module: GraphModule) -> None:
        self.required(graph_module)

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        yield from self.work(graph_module)

    def ensures(self, graph_module: GraphModule) -> None:
        self.ensured(graph_module)


def nothing(graph_module: BioGraphModule) -> Iterator[Remark]:
    return iter(())


def captured(forward: Callable[[Tensor], Any]) -> BioGraphModule:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Any:
            return forward(x)

    return biofx.capture(Model())


@pytest.fixture
def graph_module() -> BioGraphModule:
    return captured(lambda x: torch.relu(x) + torch.relu(-x))


def names(graph_module: GraphModule) -> list[str]:
    return [node.name for node in graph_module.graph.nodes]


def rewired(graph: Graph, old: str, new: str) -> Node:
    """Let the users of one node read another instead, and return the first."""
    nodes: dict[str, Node] = {node.name: node for node in graph.nodes}
    nodes[old].replace_all_uses_with(nodes[new])
    return nodes[old]


def test_a_pass_returns_a_rewritten_copy_and_leaves_its_input_alone(
    graph_module: BioGraphModule, unchanged: Callable[[nn.Module], Any]
) -> None:
    before, code = biofx.format_graph(graph_module), graph_module.code
    nodes = list(graph_module.graph.nodes)
    with unchanged(graph_module):
        result = ReplaceRelu()(graph_module)
    assert biofx.format_graph(graph_module) == before
    assert graph_module.code == code
    assert list(graph_module.graph.nodes) == nodes
    assert result.graph_module is not graph_module
    x = torch.randn(4)
    torch.testing.assert_close(graph_module(x), x.abs())
    torch.testing.assert_close(result.graph_module(x), torch.tanh(x) + torch.tanh(-x))


def test_a_result_unpacks_and_says_whether_the_graph_was_modified(graph_module: BioGraphModule) -> None:
    result = ReplaceRelu()(graph_module)
    bio, report = result
    assert isinstance(result, PassResult)
    assert bio is result.graph_module
    assert report is result.report
    assert result.modified is True
    assert Scripted(work=nothing)(graph_module).modified is False


def test_a_plain_graph_module_is_taken_too(mlp: nn.Module, vectors: Tensor) -> None:
    plain = torch.fx.symbolic_trace(mlp)
    bio, report = passes.ScaleGradients()(plain)
    assert report.modified
    assert torch.equal(bio(vectors), plain(vectors))
    assert not any("bio_mod" in name for name in plain.state_dict())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, "model", Graph()])
def test_what_is_no_graph_module_is_refused_with_the_way_out(model: Any) -> None:
    found = type(model).__name__
    with pytest.raises(
        InputError, match=f"replace-relu: expected a torch.fx.GraphModule, found {found}; .*capture"
    ):
        ReplaceRelu()(model)


# the contract between remarks and changes


def test_a_remark_without_a_change_breaks_the_contract(graph_module: BioGraphModule) -> None:
    def work(gm: BioGraphModule) -> Iterator[Remark]:
        yield applied(next(iter(gm.graph.nodes)), "", "nothing at all")

    with pytest.raises(
        PassError, match="scripted broke its contract: 1 candidates reported rewritten, 0 nodes"
    ):
        Scripted(work=work)(graph_module)


@pytest.mark.parametrize("says_missed", [True, False])
def test_a_change_without_a_remark_breaks_the_contract(
    graph_module: BioGraphModule, says_missed: bool
) -> None:
    def work(gm: BioGraphModule) -> Iterator[Remark]:
        (node, *_) = gm.graph.find_nodes(op="call_function", target=torch.relu)
        node.target = torch.tanh
        if says_missed:
            yield missed(node, "", "left alone")

    with pytest.raises(
        PassError, match="scripted broke its contract: 0 candidates reported rewritten, 1 nodes"
    ):
        Scripted(work=work)(graph_module)


def test_a_pass_that_failed_leaves_its_input_as_it_was(graph_module: BioGraphModule) -> None:
    before = biofx.format_graph(graph_module)

    def work(gm: BioGraphModule) -> Iterator[Remark]:
        yield applied(rewired(gm.graph, "relu", "x"), "", "half of the work")
        raise ZeroDivisionError("the other half")

    with pytest.raises(ZeroDivisionError):
        Scripted(work=work)(graph_module)
    assert biofx.format_graph(graph_module) == before


def fail(*_: Any) -> Any:
    raise ZeroDivisionError("my own bug")


def broken_graph(graph_module: BioGraphModule) -> Iterator[Remark]:
    """Leave a node that reads one which comes later."""
    (early, late) = graph_module.graph.find_nodes(op="call_function", target=torch.relu)
    early.args = (late,)
    yield applied(early, "", "broken")


@pytest.mark.parametrize(
    ("broken", "kind", "message"),
    [
        (Scripted(work=fail), ZeroDivisionError, "my own bug"),
        (Scripted(work=nothing, required=fail), ZeroDivisionError, "my own bug"),
        (Scripted(work=nothing, ensured=fail), ZeroDivisionError, "my own bug"),
        (Scripted(work=nothing, only=fail), ZeroDivisionError, "my own bug"),
        (Scripted(work=broken_graph), RuntimeError, "was used before it has been defined"),
    ],
    ids=["rewrite", "requires", "ensures", "predicate", "lint"],
)
def test_a_foreign_exception_keeps_its_type_and_gains_a_note(
    graph_module: BioGraphModule, broken: Pass, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        broken(graph_module)
    assert type(caught.value) is kind
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert note.startswith(f"raised by pass {broken}, which was given this graph:\n")
        assert note.endswith(biofx.format_graph(graph_module))


def test_an_error_of_the_library_gains_no_note(graph_module: BioGraphModule) -> None:
    with pytest.raises(SelectorError) as caught:
        Scripted(work=nothing, only="nowhere")(graph_module)
    assert not getattr(caught.value, "__notes__", [])


def test_a_pass_implements_candidates_and_rewrite_node_or_rewrite() -> None:
    class Neither(Pass):
        name: ClassVar[str] = "neither"

    with pytest.raises(TypeError, match="Neither must implement candidates and rewrite_node, or rewrite"):
        Neither()


def test_a_rewrite_that_returns_nothing_is_told_to_yield_remarks(graph_module: BioGraphModule) -> None:
    with pytest.raises(
        PassError,
        match="silent broke its contract: rewrite returned None; yield a remark for each candidate",
    ):
        Silent()(graph_module)
    with pytest.raises(
        PassError,
        match="replace-relu broke its contract: rewrite_node returned None for 'relu'; return a remark",
    ):
        SilentNode()(graph_module)


@pytest.mark.parametrize("returned", [[], (), 3])
def test_a_rewrite_that_returns_its_remarks_together_is_told_to_yield_each(
    graph_module: BioGraphModule, returned: Any
) -> None:
    class Together(Pass):
        name: ClassVar[str] = "together"

        def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Any:
            return returned

    kind = type(returned).__name__
    with pytest.raises(
        PassError, match=f"rewrite returned a {kind}; yield a remark for each candidate, once"
    ):
        Together()(graph_module)


def test_what_is_no_remark_is_refused(graph_module: BioGraphModule) -> None:
    def work(gm: BioGraphModule) -> Iterator[Any]:
        yield "replaced"

    with pytest.raises(PassError, match=r"expected a remark .* found 'replaced'"):
        Scripted(work=work)(graph_module)


class Silent(Pass):
    name: ClassVar[str] = "silent"

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> None:  # type: ignore[override]
        return None


class SilentNode(ReplaceRelu):
    def rewrite_node(self, candidate: Node, options: Pass) -> None:  # type: ignore[override]
        return None


def test_the_options_of_a_candidate_are_the_pass_that_rewrites_it(graph_module: BioGraphModule) -> None:
    found = []

    class Seen(ReplaceRelu):
        def rewrite_node(self, candidate: Node, options: Any) -> Remark:
            found.append((candidate.name, self is options, options.function))
            return super().rewrite_node(candidate, options)

    Seen(overrides=(Override("relu_1", (("function", torch.sigmoid),)),))(graph_module)
    assert found == [("relu", True, torch.tanh), ("relu_1", True, torch.sigmoid)]


def test_candidates_are_found_before_the_first_is_rewritten_and_remarks_among_them_are_kept(
    graph_module: BioGraphModule,
) -> None:
    class Lazy(ReplaceRelu):
        def candidates(self, graph_module: BioGraphModule) -> Iterator[Any]:  # type: ignore[override]
            for node in graph_module.graph.nodes:
                if node.target is torch.relu:
                    yield node
                elif node.op == "placeholder":
                    yield missed(node, "", "it is an input")

        def rewrite_node(self, candidate: Node, options: Any) -> list[Remark]:  # type: ignore[override]
            with candidate.graph.inserting_after(candidate):
                made = candidate.graph.call_function(torch.relu, (candidate,))
            candidate.replace_all_uses_with(made, lambda user: user is not made)
            return [applied(candidate, "", "doubled"), applied(candidate, "", "and told twice")]

    report = Lazy()(graph_module).report
    assert [str(remark) for remark in report.remarks] == [
        "missed  x: it is an input",
        *(
            f"applied {name}: {words}"
            for name in ("relu", "relu_1")
            for words in ("doubled", "and told twice")
        ),
    ]


def test_each_candidate_that_is_not_selected_is_left_alone_with_the_reason(
    graph_module: BioGraphModule,
) -> None:
    report = ReplaceRelu(exclude="relu_1")(graph_module).report
    assert [str(remark) for remark in report.remarks] == [
        "applied relu: replaced",
        "missed  relu_1: excluded by 'relu_1'",
    ]
    assert [remark.reason for remark in report.remarks] == ["", "off"]


# before and after


def test_a_result_that_is_taken_for_the_model_says_to_unpack(graph_module: BioGraphModule) -> None:
    result: Any = passes.ScaleGradients()(graph_module)
    with pytest.raises(InputError, match=r"unpack it: bio_model, report = biofx\.transform"):
        result(torch.randn(2, 3))
    with pytest.raises(AttributeError, match=r"asked for 'parameters'; unpack it"):
        result.parameters()
    assert not pickle.loads(pickle.dumps(copy.deepcopy(result))).modified


def test_requires_sees_the_graph_before_and_ensures_the_result(graph_module: BioGraphModule) -> None:
    seen: list[tuple[str, str]] = []

    def work(gm: BioGraphModule) -> Iterator[Remark]:
        node = rewired(gm.graph, "relu", "x")
        yield applied(node, "", "bypassed")

    def see(when: str) -> Callable[[GraphModule], None]:
        return lambda gm: seen.append((when, gm.code))

    result = Scripted(work=work, required=see("before"), ensured=see("after"))(graph_module)
    assert [when for when, _ in seen] == ["before", "after"]
    assert seen[0][1].count("torch.relu") == 2
    assert seen[1][1].count("torch.relu") == 1  # recompiled, and without the orphan
    assert seen[1][1] == result.graph_module.code


@pytest.mark.parametrize("side", ["required", "ensured"])
def test_a_pass_can_refuse_a_graph_before_or_after(graph_module: BioGraphModule, side: str) -> None:
    def refuse(_: GraphModule) -> None:
        raise PassError("not this one")

    with pytest.raises(PassError, match=r"^not this one$"):
        Scripted(work=nothing, **{side: refuse})(graph_module)  # type: ignore[arg-type]


# dead code


def bypass(old: str, new: str) -> Scripted:
    def work(gm: BioGraphModule) -> Iterator[Remark]:
        yield applied(rewired(gm.graph, old, new), "", f"{new} instead")

    return Scripted(work=work)


def test_what_a_pass_orphaned_is_erased_with_all_that_led_up_to_it() -> None:
    before = captured(lambda x: torch.relu(torch.tanh(torch.exp(x))) + x)
    bio, report = bypass("relu", "x")(before)
    assert names(bio) == ["x", "add", "output"]
    assert {change.node for change in report.changes if change.kind == "erased"} == {"exp", "tanh", "relu"}


def test_what_a_pass_made_and_did_not_use_is_erased(graph_module: BioGraphModule) -> None:
    def work(gm: BioGraphModule) -> Iterator[Remark]:
        (node, *_) = gm.graph.find_nodes(op="call_function", target=torch.relu)
        with gm.graph.inserting_after(node):
            gm.graph.call_function(torch.tanh, (node,))
            gm.graph.get_attr("scale")
        node.target = torch.sigmoid
        yield applied(node, "", "replaced")

    bio, _ = Scripted(work=work)(graph_module)
    assert names(bio) == names(graph_module)


def test_what_the_model_itself_never_used_stays() -> None:
    def forward(x: Tensor) -> Tensor:
        torch.exp(x)
        return torch.relu(x)

    before = captured(forward)
    bio, _ = ReplaceRelu()(before)
    assert names(bio) == names(before) == ["x", "exp", "relu", "output"]


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "function with an underscore": lambda x: torch.tanh(torch.relu_(x) * 2),
    "method with an underscore": lambda x: torch.tanh(x.mul_(3)),
    "operator": lambda x: torch.tanh(operator.iadd(x, 1)),  # type: ignore[no-untyped-call]
    "argument": lambda x: torch.tanh(nn.functional.relu(x, inplace=True)),
}


@pytest.mark.parametrize("forward", IN_PLACE.values(), ids=IN_PLACE)
def test_an_orphan_that_changes_a_tensor_in_place_stays(forward: Callable[[Tensor], Any]) -> None:
    before = captured(forward)
    bio, _ = bypass("tanh", "x")(before)
    assert names(bio) == [*names(before)[:2], "output"]
    x, y = torch.tensor([-1.0, 2.0]), torch.tensor([-1.0, 2.0])
    before(x)
    bio(y)
    assert torch.equal(x, y)


def test_an_orphaned_module_call_stays() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(x))

    bio, _ = bypass("relu", "x")(biofx.capture(Model()))
    assert names(bio) == ["x", "norm", "output"]


def test_a_double_underscore_method_is_no_change_in_place() -> None:
    before = captured(lambda x: torch.relu(x.__add__(1)))
    assert len(names(before)) == 4
    assert names(bypass("relu", "x")(before).graph_module) == ["x", "output"]


# options


def test_the_options_are_the_fields_those_of_every_pass_last() -> None:
    assert ReplaceRelu.option_names() == ["function", "only", "exclude", "enabled", "overrides"]


def test_a_pass_is_built_from_its_options() -> None:
    assert passes.SplitWeights.from_options({"gamma": 4, "only": ["fc"]}) == passes.SplitWeights(
        gamma=4, only=("fc",)
    )


def test_an_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match="split-weights has no option 'gama'; did you mean 'gamma'"):
        passes.SplitWeights.from_options({"gama": 4})


def test_a_pass_is_a_frozen_hashable_record() -> None:
    split = passes.SplitWeights(gamma=4, only=["fc"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.gamma = 2  # type: ignore[misc]
    assert {split, passes.SplitWeights(gamma=4, only=("fc",))} == {split}


@pytest.mark.parametrize("value", [1, "yes", None])
def test_enabled_is_true_or_false(value: Any) -> None:
    with pytest.raises(OptionError, match="split-weights: enabled: expected True or False, found"):
        passes.SplitWeights(enabled=value)


@pytest.mark.parametrize("side", ["only", "exclude"])
def test_what_is_no_selector_is_refused_at_construction(side: str) -> None:
    with pytest.raises(SelectorError, match="a selector is a name"):
        passes.SplitWeights(**{side: 3})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [3, None, "fc", ["fc"], [("fc", {"gamma": 2})], [Override("fc", ())]])
def test_overrides_are_records_with_options(value: Any) -> None:
    with pytest.raises(OptionError, match="split-weights: overrides: expected"):
        passes.SplitWeights(overrides=value)


@pytest.mark.parametrize("option", ["gama", "only", "overrides", "name"])
def test_an_override_of_what_is_no_option_of_a_layer_is_refused(option: str) -> None:
    with pytest.raises(OptionError, match=f"split-weights has no option '{option}' to override"):
        passes.SplitWeights(overrides=(Override("fc", ((option, 3),)),))


def test_an_override_is_checked_like_the_option_itself() -> None:
    with pytest.raises(
        OptionError, match=r"split-weights: gamma: expected a whole number in \[0, inf\), found -1"
    ):
        passes.SplitWeights(overrides=(Override("fc", (("gamma", -1),)),))


def test_the_text_of_a_pass_shows_what_differs_from_the_defaults() -> None:
    assert str(passes.SplitWeights()) == "split-weights"
    override = Override(["a", "b c"], (("gamma", 8), ("enabled", False)))
    full = passes.SplitWeights(gamma=4, activation="torch.tanh", only="fc", overrides=(override,))
    assert str(full) == (
        'split-weights{gamma=4,activation=torch.tanh,only=fc,@[a,"b c"]{gamma=8,enabled=false}}'
    )


def test_a_disabled_pass_gives_its_reason_for_each_candidate(graph_module: BioGraphModule) -> None:
    result = ReplaceRelu(enabled=False)(graph_module)
    assert not result.modified
    assert [str(remark) for remark in result.report.remarks] == [
        "missed  relu: switched off here (enabled=False)",
        "missed  relu_1: switched off here (enabled=False)",
    ]


def test_an_override_holds_for_what_it_picks(graph_module: BioGraphModule) -> None:
    override = Override("relu_1", (("function", torch.sigmoid),))
    bio, _ = ReplaceRelu(overrides=(override,))(graph_module)
    assert [node.target for node in bio.graph.nodes if node.name.startswith("relu")] == [
        torch.tanh,
        torch.sigmoid,
    ]


def test_a_scope_answers_only_the_pass_it_was_made_for(graph_module: BioGraphModule) -> None:
    scope = Scope(ReplaceRelu(), graph_module, ())
    with pytest.raises(
        PassError, match="the scope of replace-relu was asked for the options of split-weights"
    ):
        scope.options(passes.SplitWeights(), next(iter(graph_module.graph.nodes)), "")


# names


@pytest.mark.parametrize("cls", [getattr(passes, name) for name in passes.__all__], ids=passes.__all__)
def test_file_class_and_name_of_a_pass_derive_from_each_other(cls: type[Pass]) -> None:
    words = re.findall("[A-Z][a-z]*", cls.__name__)
    assert "".join(words) == cls.__name__
    assert cls.name == "-".join(words).lower()
    module = sys.modules[cls.__module__]
    assert cls.__module__ == f"biofx.passes.{'_'.join(words).lower()}"
    assert Path(str(module.__file__)).stem == "_".join(words).lower()


def test_every_file_of_the_folder_is_a_pass_in_the_list() -> None:
    folder = Path(str(passes.__file__)).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {cls.__module__.rpartition(".")[2] for cls in available_passes().values()}


@pytest.mark.parametrize("cls", [getattr(passes, name) for name in passes.__all__], ids=passes.__all__)
def test_a_pass_without_options_says_so_and_runs_only_after_passes_that_exist(cls: type[Pass]) -> None:
    assert str(cls()) == cls.name
    assert set(cls.after) <= set(available_passes())
    assert isinstance(Pipeline((cls(),)).passes[0], cls)


def test_a_pass_file_is_short_and_leaves_selection_to_the_base() -> None:
    for path in Path(str(passes.__file__)).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 150, path.name
        assert "isinstance(options, str)" not in text, path.name
