"""From a config, or a choice of passes, to a pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx import BioConfig, Distribution, Pass, Pipeline
from biofx.config import config_options
from biofx.errors import PipelineError
from biofx.options import declared_options
from biofx.passes import ConstrainSigns, FoldSplits, ObserveActivity, ScaleGradients, SplitWeights
from biofx.rewriting import compile_config
from biofx.rewriting.compile_config import choose_passes
from biofx.select import Override

OFF = BioConfig(fuzzy_lr_distribution=Distribution.BASELINE)
ON = BioConfig(weight_splitting_Gamma=4, apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0.3)


def test_the_default_config_scales_gradients_alone() -> None:
    assert compile_config(BioConfig()) == Pipeline((ScaleGradients(),))


def test_a_mechanism_that_is_off_contributes_no_pass() -> None:
    assert compile_config(OFF).passes == ()
    assert compile_config(BioConfig(fuzzy_learning_rate_factor_nu=0)).passes == ()
    assert compile_config(OFF.replace(weight_splitting_Gamma=1)).passes == ()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weight_splitting_Gamma": 2}, (SplitWeights(gamma=2), FoldSplits())),
        ({"apply_dales_principle": True}, (ConstrainSigns(),)),
        ({"fuzzy_lr_distribution": "beta"}, (ScaleGradients(distribution=Distribution.BETA),)),
    ],
)
def test_a_mechanism_that_is_on_contributes_its_pass(
    fields: dict[str, Any], expected: tuple[Pass, ...]
) -> None:
    assert compile_config(OFF.replace(**fields)).passes == expected


def test_every_option_of_a_config_reaches_its_pass() -> None:
    config = BioConfig(
        weight_splitting_Gamma=4,
        weight_splitting_activation_function=torch.tanh,
        apply_dales_principle=True,
        dales_method="abs",
        dales_axis="postsynaptic",
        dales_excitatory_fraction=0.8,
        dales_constrain_inputs=True,
        dales_constrain_readout=True,
        fuzzy_learning_rate_factor_nu=0.3,
        fuzzy_lr_distribution=Distribution.GAMMA,
        fuzzy_lr_min=0.25,
        fuzzy_lr_max=3.0,
        seed=7,
    )
    assert compile_config(config).passes == (
        SplitWeights(gamma=4, activation=torch.tanh),
        ConstrainSigns(
            method="abs",
            axis="postsynaptic",
            excitatory_fraction=0.8,
            constrain_inputs=True,
            constrain_readout=True,
            seed=7,
        ),
        ScaleGradients(nu=0.3, distribution=Distribution.GAMMA, low=0.25, high=3.0, seed=7),
        FoldSplits(),
    )


def test_an_override_reaches_the_passes_that_have_the_option_in_order() -> None:
    config = ON.override("a", weight_splitting_Gamma=2, fuzzy_learning_rate_factor_nu=0.1)
    config = config.override(["a", "b"], weight_splitting_Gamma=8)
    split, signs, scale, fold = compile_config(config).passes
    assert split.overrides == (
        Override("a", (("gamma", 2),)),
        Override(("a", "b"), (("gamma", 8),)),
    )
    assert signs.overrides == fold.overrides == ()
    assert scale.overrides == (Override("a", (("nu", 0.1),)),)


def test_an_override_switches_a_mechanism_on_for_some_layers(mlp: nn.Module) -> None:
    config = OFF.override("0", apply_dales_principle=True, dales_constrain_inputs=True)
    config = config.override("2", weight_splitting_Gamma=2)
    report = biofx.transform(mlp, config).report
    applied = [
        (entry.name, remark.layer)
        for entry in report.passes
        for remark in entry.remarks
        if remark.kind == "applied"
    ]
    assert applied[:2] == [("split-weights", "2"), ("constrain-signs", "0")]
    assert applied[2:] == [("fold-splits", layer) for layer in ("2", "2", "4")]


def test_two_overrides_may_switch_a_mechanism_on_together(mlp: nn.Module) -> None:
    config = BioConfig(fuzzy_lr_distribution=Distribution.BASELINE, fuzzy_learning_rate_factor_nu=0)
    config = config.override("*", fuzzy_lr_distribution="uniform").override(
        "2", fuzzy_learning_rate_factor_nu=0.2
    )
    report = biofx.transform(mlp, config).report
    assert [remark.layer for remark in report.remarks if remark.kind == "applied"] == ["2"]


def test_an_override_switches_a_mechanism_off_for_some_layers(mlp: nn.Module) -> None:
    config = BioConfig().override("2", fuzzy_lr_distribution=Distribution.BASELINE)
    report = biofx.transform(mlp, config).report
    said = {remark.layer: (remark.kind, remark.message) for remark in report.remarks}
    assert [said[layer][0] for layer in ("0", "2", "4")] == ["applied", "missed", "applied"]
    assert said["2"][1] == "every factor would be 1 (baseline, nu=0.16)"


def test_a_pass_may_be_picked_by_name() -> None:
    assert compile_config(ON, ["scale-gradients"]).passes == (ScaleGradients(nu=0.3),)
    assert compile_config(ON, ["scale-gradients", "split-weights"]).passes == (
        SplitWeights(gamma=4),
        ScaleGradients(nu=0.3),
    )


def test_a_pass_that_the_config_switches_off_is_refused_with_the_fields_that_do() -> None:
    with pytest.raises(
        PipelineError,
        match=r"pass 'split-weights' is asked for, but .* switches it off; see weight_splitting_Gamma",
    ):
        compile_config(BioConfig(), ["split-weights"])


def test_a_name_the_config_knows_nothing_of_is_refused() -> None:
    with pytest.raises(
        PipelineError, match="no options for pass 'split-weight'; did you mean 'split-weights'"
    ):
        compile_config(ON, ["split-weight"])


def test_factors_that_follow_activity_bring_the_pass_that_observes_it() -> None:
    config = BioConfig(fuzzy_lr_distribution=Distribution.ACTIVITY, fuzzy_lr_dynamic=True)
    scale = ScaleGradients(distribution=Distribution.ACTIVITY)
    assert compile_config(config).passes == (scale, ObserveActivity())
    assert compile_config(config.replace(fuzzy_lr_dynamic=False)).passes == (scale,)


def test_activity_is_observed_where_an_override_asks_for_it() -> None:
    config = BioConfig(fuzzy_lr_dynamic=True).override("fc", fuzzy_lr_distribution=Distribution.ACTIVITY)
    observe = compile_config(config).passes[1]
    assert str(observe) == "observe-activity{enabled=false,@fc{enabled=true}}"


def test_what_a_config_says_of_a_mechanism_does_not_hinder_the_others() -> None:
    config = ON.replace(fuzzy_lr_distribution=Distribution.TEMPORAL)
    assert compile_config(config, ["split-weights"]).passes == (SplitWeights(gamma=4),)


# the passes argument of transform


def test_without_a_choice_the_config_decides() -> None:
    assert choose_passes(None, ON) == compile_config(ON)
    assert choose_passes(None, None) == compile_config(BioConfig())


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("split-weights", (SplitWeights(gamma=4),)),
        ("scale-gradients, split-weights", (SplitWeights(gamma=4), ScaleGradients(nu=0.3))),
        (" split-weights ,scale-gradients\n", (SplitWeights(gamma=4), ScaleGradients(nu=0.3))),
        (["split-weights", "scale-gradients"], (SplitWeights(gamma=4), ScaleGradients(nu=0.3))),
        ("split-weights{gamma=8},scale-gradients", (SplitWeights(gamma=8), ScaleGradients(nu=0.3))),
        (SplitWeights(), (SplitWeights(),)),
        ([SplitWeights(), "constrain-signs"], (SplitWeights(), ConstrainSigns())),
        ((ScaleGradients(), SplitWeights(gamma=8)), (SplitWeights(gamma=8), ScaleGradients())),
        ([], ()),
        ("", ()),
    ],
)
def test_a_bare_name_takes_its_options_from_the_config_and_all_else_stands_for_itself(
    choice: Any, expected: tuple[Pass, ...]
) -> None:
    assert choose_passes(choice, ON).passes == expected


def test_a_bare_name_without_a_config_has_its_own_defaults() -> None:
    assert choose_passes("split-weights,constrain-signs", None).passes == (SplitWeights(), ConstrainSigns())


def test_a_bare_name_takes_the_overrides_of_the_config_too() -> None:
    (split,) = choose_passes("split-weights", ON.override("fc", weight_splitting_Gamma=2)).passes
    assert split.overrides == (Override("fc", (("gamma", 2),)),)


def test_a_pipeline_is_taken_as_it_is() -> None:
    pipeline = Pipeline((SplitWeights(),), only="fc")
    assert choose_passes(pipeline, ON) is pipeline


def test_a_bare_name_that_the_config_switches_off_is_refused() -> None:
    with pytest.raises(PipelineError, match="'split-weights' is asked for, but this config switches it off"):
        choose_passes("split-weights", BioConfig())


@pytest.mark.parametrize("choice", [3, SplitWeights, [SplitWeights], [None], [["split-weights"]]])
def test_what_is_no_choice_of_passes_is_refused(choice: Any) -> None:
    with pytest.raises(PipelineError, match=r"passes: expected a pass, .* found .*SplitWeights\(gamma=2\)"):
        choose_passes(choice, ON)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(PipelineError, match="unknown pass 'split-weight'; did you mean 'split-weights'"):
        choose_passes(["split-weight"], ON)


def test_each_option_of_a_pass_is_declared_by_the_field_of_the_config_that_feeds_it() -> None:
    fed = {
        (name, feeds.option): field
        for field, declared in config_options().items()
        for name, feeds in declared.feeds.items()
        if feeds.option != "enabled"
    }
    declared = {
        (name, option): found.field
        for name, cls in biofx.rewriting.available_passes().items()
        for option, found in declared_options(cls).items()
    }
    assert declared == fed
    known = biofx.rewriting.available_passes()
    assert all(name in known for found in config_options().values() for name in {*found.feeds, *found.off})


@pytest.mark.parametrize("cls", [BioConfig, ConstrainSigns, ScaleGradients, SplitWeights])
def test_the_docstring_lists_every_option_with_its_range_and_default(cls: type) -> None:
    text = " ".join(str(cls.__doc__).split())
    options = declared_options(cls)
    assert len(options) > 1
    assert all(
        f" {name}: {found.doc} Expected: {found.permitted}; default: " in text
        for name, found in options.items()
    )


def test_an_ellipsis_stands_for_the_passes_of_the_config_where_it_is() -> None:
    own = ScaleGradients(nu=0.1, only="0")
    assert choose_passes([..., own], BioConfig()).passes == (ScaleGradients(), own)
    assert choose_passes([own, ...], BioConfig()).passes == (own, ScaleGradients())
    assert choose_passes([..., own], None).passes == (ScaleGradients(), own)
    assert set(choose_passes([..., own], ON).passes) == {*compile_config(ON).passes, own}
