"""Several passes as one: their order, their text, who watches them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.passes.infra.pass_manager import PassManager

import biofx
from biofx import BioConfig, BioGraphModule, OptionError, Pass, Pipeline, Remark, Scope
from biofx.errors import InputError, PipelineError, SelectorError
from biofx.operators.rate_sampling import Distribution
from biofx.passes import ConstrainSigns, ScaleGradients, SplitWeights
from biofx.rewriting.pipeline import stages_of
from biofx.select import Override


@dataclass(frozen=True, kw_only=True)
class Idle(Pass):
    """A pass that does nothing, under a name of its own."""

    label: str = ""

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        return iter(())


def idle(name: str, *after: str) -> Pass:
    return type(name, (Idle,), {"name": name, "after": after})()  # type: ignore[no-any-return]


def order(*passes: Pass) -> list[str]:
    return [entry.name for entry in Pipeline(passes).passes]


# order


def test_passes_run_after_those_they_declare() -> None:
    assert order(ScaleGradients(), ConstrainSigns(), SplitWeights()) == [
        "split-weights",
        "constrain-signs",
        "scale-gradients",
    ]


def test_passes_that_declare_nothing_keep_their_order() -> None:
    assert order(idle("c"), idle("a"), idle("b"), idle("a")) == ["c", "a", "b", "a"]


def test_only_what_must_move_moves() -> None:
    assert order(idle("late", "early"), idle("early"), idle("other")) == ["early", "late", "other"]
    assert order(idle("a"), idle("b", "z"), idle("c"), idle("z")) == ["a", "c", "z", "b"]


def test_a_dependency_that_is_not_there_does_not_matter() -> None:
    assert order(idle("b", "absent"), idle("a")) == ["b", "a"]


def test_a_dependency_holds_for_every_pass_of_that_name() -> None:
    assert order(SplitWeights(gamma=2), ScaleGradients(), SplitWeights(gamma=4)) == [
        "split-weights",
        "split-weights",
        "scale-gradients",
    ]


def test_a_cycle_is_refused_and_named() -> None:
    with pytest.raises(PipelineError) as caught:
        order(idle("free"), idle("a", "c"), idle("b", "a"), idle("c", "b"))
    message = str(caught.value)
    assert message.startswith("the order of the passes is cyclic: ")
    assert sorted(message.partition(": ")[2].split(", ")) == ["a after c", "b after a", "c after b"]


def test_a_pass_after_itself_is_a_cycle() -> None:
    with pytest.raises(PipelineError, match="cyclic: a after a"):
        order(idle("a", "a"))


# what is a pipeline


@pytest.mark.parametrize("passes", [3, None, "split-weights", SplitWeights(), SplitWeights])
def test_a_pipeline_takes_a_sequence_of_passes(passes: Any) -> None:
    with pytest.raises(PipelineError, match=r"expected a sequence of passes, found .*; see Pipeline.parse"):
        Pipeline(passes)


@pytest.mark.parametrize("entry", ["split-weights", SplitWeights, None])
def test_each_entry_is_a_pass(entry: Any) -> None:
    with pytest.raises(
        PipelineError, match=r"expected passes, found .* among them; .*SplitWeights\(gamma=2\)"
    ):
        Pipeline([SplitWeights(), entry])  # type: ignore[arg-type]


def test_passes_may_come_from_any_iterable() -> None:
    assert Pipeline(entry for entry in [SplitWeights()]).passes == (SplitWeights(),)  # type: ignore[arg-type]


def test_a_pipeline_has_no_options_to_override() -> None:
    with pytest.raises(OptionError, match="a pipeline has no options to override"):
        Pipeline((SplitWeights(),), overrides=(Override("fc", (("enabled", False),)),))


def test_an_observer_is_a_callable() -> None:
    with pytest.raises(OptionError, match="observe: expected a callable of three texts, found 'print'"):
        Pipeline((), observe="print")  # type: ignore[arg-type]


def test_a_pipeline_takes_graph_modules_alone(mlp: nn.Module) -> None:
    with pytest.raises(InputError, match=r"pipeline: expected a torch.fx.GraphModule, found Sequential"):
        Pipeline((SplitWeights(),))(mlp)  # type: ignore[arg-type]


# text


def test_an_unknown_pass_suggests_the_nearest() -> None:
    with pytest.raises(PipelineError, match="unknown pass 'split-weight'; did you mean 'split-weights'"):
        Pipeline.parse("scale-gradients,split-weight")


def test_an_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match="split-weights has no option 'gama'; did you mean 'gamma'"):
        Pipeline.parse("split-weights{gama=2}")


@pytest.mark.parametrize("text", [None, 3, ["split-weights"], SplitWeights()])
def test_only_text_is_parsed(text: Any) -> None:
    with pytest.raises(PipelineError, match="expected a pipeline as text, found"):
        Pipeline.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "split-weights{gamma=-1}",
        "split-weights{gamma=2.0}",
        "split-weights{activation=relu}",
        'split-weights{activation="import:os:system"}',
        "split-weights{mode=neighbors}",
        "split-weights{enabled=1}",
        "split-weights{overrides=3}",
        "split-weights{overrides=[a]}",
        "split-weights{@fc{gamma=-1}}",
        "split-weights{@fc{gama=1}}",
        "split-weights{@fc{only=x}}",
        "scale-gradients{nu=nan}",
        "scale-gradients{nu=1e999}",
        "scale-gradients{low=1.5}",
        "scale-gradients{distribution=seasonal}",
        "(split-weights){gamma=2}",
        "(split-weights){@fc{enabled=false}}",
        "(split-weights){observe=print}",
        "(split-weights){overrides=3}",
    ],
)
def test_a_bad_option_in_a_text_is_an_option_error(text: str) -> None:
    with pytest.raises(OptionError):
        Pipeline.parse(text)


@pytest.mark.parametrize("options", ["{only=3}", "{exclude=[fc,1]}", '{only="re:["}', '{@""{gamma=2}}'])
def test_a_bad_selector_in_a_text_is_refused(options: str) -> None:
    with pytest.raises(SelectorError):
        Pipeline.parse(f"split-weights{options}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "()",
        "split-weights",
        "split-weights{gamma=4},constrain-signs,scale-gradients{nu=0.1}",
        'scale-gradients{nu=0.1,low=0.0,high=1e+16,seed=7,@"type:Linear"{nu=0.3},@[a,b]{enabled=false}}',
        "split-weights{activation=torch.tanh,only=[layer1.*,fc#1],exclude=[],enabled=false}",
        "(split-weights)",
        "((split-weights),split-weights{gamma=4})",
        '(split-weights,(constrain-signs){exclude="0"}){only=layer1}',
        "(split-weights){enabled=false}",
    ],
)
def test_a_text_in_plain_form_comes_back(text: str) -> None:
    assert str(Pipeline.parse(text)) == text


def test_the_text_of_a_pipeline_is_in_the_order_in_which_it_runs() -> None:
    assert str(Pipeline.parse("scale-gradients , split-weights{ }")) == "split-weights,scale-gradients"


SELECTORS = st.one_of(
    st.sampled_from(
        ["fc", "layer1.*", "fc#1", "type:Linear", "re:a|b", "true", "0", "x y", 'q"', "é\n", "none"]
    ),
    st.lists(st.text(min_size=1).filter(lambda text: not text.startswith("re:")), max_size=3),
)
FRACTIONS = st.floats(0, 1)
ACTIVATIONS = st.sampled_from([torch.tanh, torch.relu, nn.functional.gelu])
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "only": st.none() | SELECTORS,
    "exclude": st.none() | SELECTORS,
    "enabled": st.booleans(),
}
OPTIONS: dict[type[Pass], dict[str, st.SearchStrategy[Any]]] = {
    SplitWeights: {"gamma": st.integers(0, 2**70), "activation": ACTIVATIONS},
    ConstrainSigns: {
        "method": st.sampled_from(["project", "abs"]),
        "axis": st.sampled_from(["presynaptic", "postsynaptic"]),
        "excitatory_fraction": FRACTIONS,
        "constrain_inputs": st.booleans(),
        "constrain_readout": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
    },
    ScaleGradients: {
        "nu": FRACTIONS,
        "distribution": st.sampled_from([Distribution.BETA, Distribution.NORMAL, Distribution.BASELINE]),
        "low": FRACTIONS,
        "high": st.floats(1, 1e300),
        "seed": st.integers(0, 2**63 - 1),
    },
}


@st.composite
def built(draw: st.DrawFn) -> Pass:
    cls = draw(st.sampled_from(list(OPTIONS)))
    own = OPTIONS[cls]
    options = draw(st.fixed_dictionaries({}, optional={**own, **COMMON}))
    chosen = st.fixed_dictionaries({}, optional={**own, "enabled": st.booleans()}).filter(bool)
    overrides = draw(st.lists(st.tuples(SELECTORS, chosen), max_size=2))
    records = tuple(Override(selector, tuple(changed.items())) for selector, changed in overrides)
    return cls(**options, overrides=records)


def grouped(inner: st.SearchStrategy[Pass]) -> st.SearchStrategy[Pass]:
    options = st.fixed_dictionaries({}, optional=COMMON)
    return st.builds(lambda passes, given: Pipeline(passes, **given), st.lists(inner, max_size=3), options)


@settings(max_examples=100, deadline=None)
@given(passes=st.lists(st.recursive(built(), grouped, max_leaves=4), max_size=3))
def test_any_pipeline_comes_back_from_its_text(passes: list[Pass]) -> None:
    pipeline = Pipeline(passes)  # type: ignore[arg-type]
    text = str(pipeline)
    parsed = Pipeline.parse(text)
    assert parsed == pipeline
    assert str(parsed) == text


def test_a_pipeline_with_a_selection_comes_back_as_the_only_group_of_another() -> None:
    pipeline = Pipeline((SplitWeights(),), only="fc")
    assert Pipeline.parse(str(pipeline)).passes == (pipeline,)


# running


def texts(pipeline: Pipeline, model: nn.Module) -> list[str]:
    return [entry.text for entry in biofx.transform(model, passes=pipeline).report.passes]


def test_a_pipeline_is_a_pass_and_does_what_its_passes_do_one_by_one(mlp: nn.Module, vectors: Tensor) -> None:
    captured = biofx.capture(mlp)
    before = biofx.format_graph(captured)
    pipeline = Pipeline((SplitWeights(), ConstrainSigns(), ScaleGradients()))
    assert isinstance(pipeline, Pass)
    bio, report = pipeline(captured)
    one_by_one: BioGraphModule = captured
    for entry in pipeline.passes:
        one_by_one = entry(one_by_one).graph_module
    assert biofx.format_graph(captured) == before
    assert biofx.format_graph(bio) == biofx.format_graph(one_by_one)
    assert torch.equal(bio(vectors), one_by_one(vectors))
    assert [entry.name for entry in report.passes] == ["split-weights", "constrain-signs", "scale-gradients"]


def test_a_pipeline_in_a_pipeline_reports_each_of_its_passes(mlp: nn.Module) -> None:
    inner = Pipeline((SplitWeights(), ScaleGradients()), only="0")
    assert texts(Pipeline((inner, ScaleGradients(nu=0.5))), mlp) == [
        "split-weights",
        "scale-gradients",
        "scale-gradients{nu=0.5}",
    ]


@pytest.mark.parametrize(
    "pipeline", [Pipeline(()), Pipeline((SplitWeights(),), enabled=False), Pipeline((Pipeline(()),))]
)
def test_a_pipeline_without_work_changes_nothing(mlp: nn.Module, pipeline: Pipeline) -> None:
    bio, report = biofx.transform(mlp, passes=pipeline)
    assert not report.modified
    assert report.passes == ()
    assert biofx.format_graph(bio) == biofx.format_graph(biofx.capture(mlp))


def test_a_failure_in_a_later_pass_leaves_the_input_as_it_was(
    mlp: nn.Module, unchanged: Callable[[nn.Module], Any]
) -> None:
    captured = biofx.capture(mlp)
    before = biofx.format_graph(captured)
    with unchanged(captured), pytest.raises(SelectorError):
        Pipeline((SplitWeights(), ScaleGradients(only="nowhere")))(captured)
    assert biofx.format_graph(captured) == before


# torch.fx's own manager


@pytest.mark.parametrize("nested", [False, True], ids=["passes", "pipeline"])
def test_passes_run_inside_the_manager_of_torch(mlp: nn.Module, vectors: Tensor, nested: bool) -> None:
    passes: list[Pass] = [SplitWeights(), ScaleGradients()]
    managed: list[Any] = [Pipeline(tuple(passes))] if nested else list(passes)
    manager = PassManager(passes=managed, run_checks_after_each_pass=True)
    captured = biofx.capture(mlp)
    before = biofx.format_graph(captured)
    result = manager(captured)
    assert result.modified is True
    assert biofx.format_graph(captured) == before
    expected = Pipeline(tuple(passes))(captured).graph_module
    assert biofx.format_graph(result.graph_module) == biofx.format_graph(expected)
    assert torch.equal(result.graph_module(vectors), expected(vectors))


def test_the_manager_of_torch_stops_when_nothing_changes_any_more(mlp: nn.Module) -> None:
    calls: list[bool] = []

    @dataclass(frozen=True, kw_only=True)
    class Counted(ScaleGradients):
        name: ClassVar[str] = "counted"

        def __call__(self, graph_module: Any) -> Any:
            result = super().__call__(graph_module)
            calls.append(result.modified)
            return result

    result = PassManager(passes=[Counted()], steps=5)(biofx.capture(mlp))
    assert calls == [True, False]
    assert result.modified is True


def test_the_manager_of_torch_is_told_when_nothing_was_modified(mlp: nn.Module) -> None:
    managed: list[Any] = [ScaleGradients(only=[])]
    assert PassManager(passes=managed)(biofx.capture(mlp)).modified is False


@pytest.mark.filterwarnings("ignore")  # of torch.export, and that a program is of one mode
def test_passes_run_on_exported_programs_by_themselves_and_in_the_manager_of_torch(
    mlp: nn.Module, vectors: Tensor
) -> None:
    program = torch.export.export(mlp, (vectors,))
    before = {name: value.clone() for name, value in program.state_dict.items()}
    passes: list[Pass] = [SplitWeights(), ScaleGradients(seed=4)]
    expected = Pipeline(tuple(passes))(biofx.capture(mlp)).graph_module
    alone = Pipeline(tuple(passes))(program)
    managed: list[Any] = [*passes]
    manager: Any = PassManager(passes=managed, run_checks_after_each_pass=True)
    for result in (alone, manager(program)):
        assert result.modified is True
        assert torch.equal(result.graph_module(vectors), expected(vectors))
        made = result.graph_module.state_dict()
        assert made.keys() == expected.state_dict().keys()
        assert all(torch.equal(value, made[name]) for name, value in expected.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict.items())


# observing


class Watch:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    def __call__(self, name: str, before: str, after: str) -> None:
        self.seen.append((name, before, after))

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.seen]


def test_an_observer_sees_each_pass_that_changed_the_graph_and_the_graph_on_both_sides(
    mlp: nn.Module,
) -> None:
    watch = Watch()
    captured = biofx.capture(mlp)
    passes = (SplitWeights(), ConstrainSigns(only=[]), ScaleGradients(nu=0.3))
    bio, _ = Pipeline(passes, observe=watch)(captured)
    assert watch.names == ["split-weights", "scale-gradients{nu=0.3}"]
    (_, first, middle), (_, middle_again, last) = watch.seen
    assert first == biofx.format_graph(captured)
    assert middle == middle_again == biofx.format_graph(SplitWeights()(captured).graph_module)
    assert last == biofx.format_graph(bio)


def test_an_observer_sees_the_passes_of_inner_pipelines_one_by_one(mlp: nn.Module) -> None:
    watch = Watch()
    inner = Pipeline((Pipeline((SplitWeights(),)), ScaleGradients()), only="*")
    biofx.transform(mlp, passes=inner, only="*", observe=watch)
    assert watch.names == ["split-weights", "scale-gradients"]


@pytest.mark.parametrize("selection", [{}, {"only": "0"}, {"exclude": "0"}])
def test_transform_lets_the_observer_see_each_pass_whatever_is_selected(
    mlp: nn.Module, selection: dict[str, Any]
) -> None:
    watch = Watch()
    biofx.transform(mlp, BioConfig(weight_splitting_Gamma=2), observe=watch, **selection)
    assert watch.names == ["split-weights", "scale-gradients", "fold-splits"]


def test_an_observer_is_no_part_of_what_a_pipeline_is() -> None:
    plain = Pipeline((SplitWeights(),))
    watched = dataclasses.replace(plain, observe=biofx.graph.print_changed)
    assert watched == plain
    assert str(watched) == str(plain)


def test_print_changed_prints_the_diff_of_each_pass(
    mlp: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    biofx.transform(mlp, passes="split-weights,constrain-signs{only=[]}", observe=biofx.graph.print_changed)
    printed = capsys.readouterr().out
    assert "after split-weights" in printed
    assert "+ _0_pooled = pool_synapses(_0, gamma=2, channel_axis=-1)" in printed
    assert "constrain-signs" not in printed


# its stages


@pytest.mark.parametrize(
    "text",
    [
        "scale-gradients{nu=0.1}",
        "split-weights,constrain-signs,scale-gradients",
        '((split-weights){only="0"},(constrain-signs,scale-gradients){exclude="4"}){exclude="1"}',
    ],
)
def test_stages_do_one_after_the_other_what_the_pipeline_does(text: str, mlp: nn.Module) -> None:
    pipeline = Pipeline.parse(text)
    whole = pipeline(biofx.capture(mlp))
    graph_module = biofx.capture(mlp)
    remarks: list[Remark] = []
    for stage in stages_of(pipeline):
        graph_module, report = stage(graph_module)
        remarks += report.remarks
    assert biofx.format_graph(graph_module) == biofx.format_graph(whole.graph_module)
    assert tuple(remarks) == whole.report.remarks


def test_a_pipeline_that_is_switched_off_has_no_stage() -> None:
    assert stages_of(Pipeline.parse("(split-weights){enabled=false}")) == ()
