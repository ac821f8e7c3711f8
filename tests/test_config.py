"""The record of options: its defaults, what it refuses, and its plain and TOML forms."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx import BioConfig, Distribution, OptionError
from biofx.callables import identity
from biofx.errors import SelectorError
from biofx.select import Candidate, Override

DEFAULTS: dict[str, Any] = {
    "consolidation": "off",
    "consolidation_strength": 1.0,
    "consolidation_effect": "pull",
    "consolidation_parameters": "all",
    "consolidation_damping": 0.1,
    "consolidation_decay": 1.0,
    "upgd_utility_decay": 0.999,
    "upgd_noise": 1e-3,
    "upgd_scaling": "network",
    "l2_to_initial_strength": 0.0,
    "fuzzy_learning_rate_factor_nu": 0.16,
    "fuzzy_lr_distribution": Distribution.UNIFORM,
    "fuzzy_lr_dynamic": False,
    "fuzzy_lr_min": 0.5,
    "fuzzy_lr_max": 2.0,
    "fuzzy_lr_log_min": 1e-3,
    "fuzzy_lr_log_max": 10.0,
    "fuzzy_lr_update_freq": 100,
    "fuzzy_lr_decay": 0.9995,
    "fuzzy_lr_granularity": "element",
    "fuzzy_lr_parameters": "weights",
    "fuzzy_lr_dtype": "float32",
    "dampening_factor": 0.6,
    "crystal_thresh": 4.5e-05,
    "crystal_min": 0.01,
    "rejuvenation_parameter_dre": 8.0,
    "rejuvenation_turnover": None,
    "rejuvenation_selection": "probability",
    "rejuvenation_threshold": None,
    "rejuvenation_utility": "magnitude",
    "rejuvenation_utility_decay": 0.99,
    "rejuvenation_utility_every": 1,
    "rejuvenation_redraw": "survivors",
    "rejuvenation_growth": "random",
    "initial_distribution": "torch",
    "initial_gain": 1.0,
    "shrink_factor": 0.9999,
    "shrink_perturbation": 0.01,
    "unit_turnover": "off",
    "unit_turnover_rate": 1e-4,
    "unit_turnover_maturity": 100,
    "unit_turnover_dormancy": 0.1,
    "synaptic_scaling_rate": 0.1,
    "weight_splitting_Gamma": 0,
    "weight_splitting_activation_function": identity,
    "weight_splitting_mode": "neighbours",
    "weight_splitting_rates": "sum",
    "weight_splitting_fold": True,
    "base_lr": 0.1,
    "stability_factor": 2.0,
    "lr_variability": 0.2,
    "apply_dales_principle": False,
    "dales_method": "project",
    "dales_initialisation": "balanced",
    "dales_signs": None,
    "dales_axis": "presynaptic",
    "dales_excitatory_fraction": 0.5,
    "dales_constrain_inputs": False,
    "dales_constrain_readout": False,
    "weight_density": 1.0,
    "weight_mask_self_connections": True,
    "weight_mask_blocks": None,
    "weight_mask_areas": None,
    "weight_mask": None,
    "weight_mask_initialisation": "rescale",
    "seed": 0,
    "overrides": (),
}
CHANGED: dict[str, Any] = {
    "consolidation": "elastic",
    "consolidation_strength": 5000.0,
    "consolidation_effect": "rates",
    "consolidation_parameters": "weights",
    "consolidation_damping": 1e-3,
    "consolidation_decay": 0.0,
    "upgd_utility_decay": 0.0,
    "upgd_noise": 0.0,
    "upgd_scaling": "layer",
    "l2_to_initial_strength": 0.01,
    "fuzzy_learning_rate_factor_nu": 0.25,
    "fuzzy_lr_distribution": Distribution.LOGNORMAL,
    "fuzzy_lr_dynamic": True,
    "fuzzy_lr_min": 0.0,
    "fuzzy_lr_max": 3.5,
    "fuzzy_lr_log_min": 1e-5,
    "fuzzy_lr_log_max": 100.0,
    "fuzzy_lr_update_freq": 1,
    "fuzzy_lr_decay": 1.0,
    "fuzzy_lr_granularity": "neuron",
    "fuzzy_lr_parameters": "all",
    "fuzzy_lr_dtype": "bfloat16",
    "dampening_factor": 1.0,
    "crystal_thresh": 1e-300,
    "crystal_min": 0.0,
    "rejuvenation_parameter_dre": 12.5,
    "rejuvenation_turnover": 0.01,
    "rejuvenation_selection": "proportion",
    "rejuvenation_threshold": 0.25,
    "rejuvenation_utility": "gradient",
    "rejuvenation_utility_decay": 0.0,
    "rejuvenation_utility_every": 10,
    "rejuvenation_redraw": "zero",
    "rejuvenation_growth": "gradient",
    "initial_distribution": "normal",
    "initial_gain": 1.4,
    "shrink_factor": 1.0,
    "shrink_perturbation": 0.0,
    "unit_turnover": "redo",
    "unit_turnover_rate": 0.5,
    "unit_turnover_maturity": 7,
    "unit_turnover_dormancy": 0.025,
    "synaptic_scaling_rate": 1.0,
    "weight_splitting_Gamma": 4,
    "weight_splitting_mode": "sub-weights",
    "weight_splitting_rates": "mean",
    "weight_splitting_fold": False,
    "weight_splitting_activation_function": torch.tanh,
    "base_lr": 1e16,
    "stability_factor": 0.001,
    "lr_variability": 0.0,
    "apply_dales_principle": True,
    "dales_method": "abs",
    "dales_initialisation": "keep",
    "dales_signs": (1, -1, 1),
    "dales_axis": "postsynaptic",
    "dales_excitatory_fraction": 0.8,
    "dales_constrain_inputs": True,
    "dales_constrain_readout": True,
    "weight_density": 0.1,
    "weight_mask_self_connections": False,
    "weight_mask_blocks": ((1.0, 0.25), (0.0, 1.0)),
    "weight_mask_areas": ((8, 2), (3, 4)),
    "weight_mask": "110 011",
    "weight_mask_initialisation": "keep",
    "seed": 2**63 - 1,
}
WITH: dict[str, dict[str, Any]] = {
    "rejuvenation_selection": {"rejuvenation_turnover": 0.01},
    "rejuvenation_threshold": {"rejuvenation_selection": "threshold"},
}
"""What a field of CHANGED needs beside it."""
NUMBER, FRACTION = "a number in ", "a number in [0, 1]"
POSITIVE, NOT_NEGATIVE = "a number in (0, inf)", "a number in [0, inf)"
FLAG = "True or False"
BAD_BLOCKS: tuple[Any, ...] = (0.5, [], [0.5], [[]], [[1], [1, 0]], "1 0", [[1.5]], [["1"]])
BAD_MASKS: tuple[Any, ...] = (1, "", "10 1", "102", [[1, 2]], [[1], [1, 0]], [[]])
BAD_AREAS: tuple[Any, ...] = (3, [], [0, 2], [1.5], [[1], 2], [[1]], [[1], [2], [3]], [[1], []], "12")
BAD: list[tuple[str, Any, str]] = [
    *[
        ("fuzzy_learning_rate_factor_nu", value, FRACTION)
        for value in (-0.1, 1.5, "0.1", None, True, math.nan)
    ],
    *[("fuzzy_lr_distribution", value, "one of baseline, uniform") for value in ("unifrom", 1, None)],
    *[("fuzzy_lr_dynamic", value, FLAG) for value in (1, "yes", None)],
    *[("fuzzy_lr_min", value, FRACTION) for value in (-0.5, 1.1, "0", math.nan)],
    *[("fuzzy_lr_max", value, "a number in [1, inf)") for value in (0.9, math.inf, 10**400, "2")],
    *[("fuzzy_lr_log_min", value, "a number in (0, 1]") for value in (0, -1e-3, 1.1, "1", math.nan)],
    *[("fuzzy_lr_log_max", value, "a number in [1, inf)") for value in (0.9, math.inf, None)],
    *[("fuzzy_lr_update_freq", value, "a whole number in [1, inf)") for value in (0, 2.0, True, "5")],
    *[("fuzzy_lr_decay", value, FRACTION) for value in (-1, 1.1, math.nan)],
    *[("dampening_factor", value, "a number in (0, 1]") for value in (0, 1.01, None)],
    *[("crystal_thresh", value, POSITIVE) for value in (0, -1e-9, math.inf)],
    *[("initial_distribution", value, "one of torch, normal, uniform") for value in ("xavier", None)],
    *[("rejuvenation_utility", value, "one of magnitude, gradient") for value in ("activity", None)],
    *[("rejuvenation_utility_decay", value, FRACTION) for value in (-0.1, 1.1)],
    *[("rejuvenation_utility_every", value, "a whole number in [1, inf)") for value in (0, 1.5, None)],
    *[("rejuvenation_redraw", value, "one of survivors, initial, zero") for value in ("mean", None)],
    *[("initial_gain", value, POSITIVE) for value in (0, -1, "1")],
    *[("shrink_factor", value, "a number in (0, 1]") for value in (0, 1.1, None)],
    *[("shrink_perturbation", value, NOT_NEGATIVE) for value in (-0.1, math.inf)],
    *[("rejuvenation_parameter_dre", value, POSITIVE) for value in (0.0, -8, "8")],
    *[
        ("weight_splitting_Gamma", value, "a whole number in [0, inf)")
        for value in (-1, 2.0, "2", True, None)
    ],
    *[
        ("weight_splitting_activation_function", value, "a callable from tensor to tensor")
        for value in (3, None, nn.ReLU)
    ],
    ("weight_splitting_activation_function", "import:os:system", "an activation such as"),
    *[("fuzzy_lr_dtype", value, "one of float32, bfloat16, seed") for value in ("int8", torch.uint8)],
    ("fuzzy_lr_dtype", "uint8", "found 'uint8', which was removed; 'seed' needs less memory"),
    ("fuzzy_lr_parameters", "biases", "one of weights, all"),
    *[("fuzzy_lr_granularity", value, "one of element, neuron, layer") for value in ("synapse", 1)],
    *[("crystal_min", value, FRACTION) for value in (-0.01, 1.5)],
    *[("rejuvenation_turnover", value, "a number in (0, 1]") for value in (0, 1.5, "some")],
    *[
        ("rejuvenation_selection", value, "one of probability, proportion, threshold")
        for value in ("lowest", None)
    ],
    *[("rejuvenation_threshold", value, FRACTION) for value in (-0.1, 1.5)],
    *[("rejuvenation_growth", value, "one of random, gradient") for value in ("rigl", None)],
    *[("unit_turnover", value, "one of off, continual-backprop, redo") for value in ("on", None)],
    *[("unit_turnover_rate", value, FRACTION) for value in (-0.1, 1.5)],
    *[("unit_turnover_maturity", value, "a whole number in [0, inf)") for value in (-1, 0.5)],
    *[("unit_turnover_dormancy", value, FRACTION) for value in (-0.1, 2)],
    *[("synaptic_scaling_rate", value, "a number in (0, 1]") for value in (0, 2, None)],
    *[("consolidation", value, "one of off, synaptic-intelligence, elastic") for value in ("ewc", None)],
    *[("consolidation_strength", value, NOT_NEGATIVE) for value in (-1, math.inf)],
    *[("consolidation_effect", value, "one of pull, rates") for value in ("push", 1)],
    *[("consolidation_parameters", value, "one of weights, all") for value in ("biases", True)],
    *[("consolidation_damping", value, POSITIVE) for value in (0, -0.1)],
    *[("consolidation_decay", value, FRACTION) for value in (-0.1, 1.5)],
    *[("upgd_utility_decay", value, FRACTION) for value in (-0.1, 2)],
    *[("upgd_noise", value, NOT_NEGATIVE) for value in (-0.1, math.nan)],
    *[("upgd_scaling", value, "one of network, layer") for value in ("global", None)],
    *[("l2_to_initial_strength", value, NOT_NEGATIVE) for value in (-0.1, "some")],
    *[("base_lr", value, POSITIVE) for value in (0, -0.1, math.nan)],
    *[("stability_factor", value, POSITIVE) for value in (0, -2.0)],
    *[("lr_variability", value, NOT_NEGATIVE) for value in (-0.2, math.inf)],
    *[("weight_splitting_mode", value, "one of neighbours, sub-weights") for value in ("blocks", None)],
    *[("weight_splitting_rates", value, "one of sum, mean") for value in ("max", 1)],
    *[("weight_splitting_fold", value, FLAG) for value in (1, None)],
    *[("apply_dales_principle", value, FLAG) for value in (1, "true")],
    *[("dales_method", value, "one of project, abs, expand") for value in ("projekt", 0)],
    *[("dales_initialisation", value, "one of balanced, keep") for value in ("zeros", None)],
    *[("dales_signs", value, "a list of 1 and -1") for value in (0, (), (1, 0), "+-", (1.5, -1))],
    *[("dales_axis", value, "one of presynaptic, postsynaptic") for value in ("rows", 1)],
    *[("dales_excitatory_fraction", value, FRACTION) for value in (-0.1, 80)],
    *[("dales_constrain_inputs", value, FLAG) for value in (0, None)],
    *[("dales_constrain_readout", value, FLAG) for value in (0, None)],
    *[("weight_density", value, "a number in (0, 1]") for value in (0, 1.5, None)],
    *[("weight_mask_self_connections", value, FLAG) for value in (0, None)],
    *[("weight_mask_blocks", value, "a list of rows of equal length") for value in BAD_BLOCKS],
    *[
        ("weight_mask_areas", value, "a list of whole numbers above 0, or two such lists")
        for value in BAD_AREAS
    ],
    *[("weight_mask", value, "rows of 0 and 1 of equal length") for value in BAD_MASKS],
    *[("weight_mask_initialisation", value, "one of rescale, keep") for value in ("zeros", None)],
    *[("seed", value, "a whole number in [0, 9223372036854775807]") for value in (-1, 2**63, 0.0)],
    ("overrides", 3, "Override records"),
    ("overrides", "fc", "Override records"),
    ("overrides", [("fc", {})], "Override records"),
    ("overrides", None, "Override records"),
]


def everything() -> BioConfig:
    """A config in which no field is at its default that another does not exclude, with two overrides."""
    config = BioConfig(**{**CHANGED, "rejuvenation_threshold": None})
    config = config.override("layer1.*", weight_splitting_Gamma=0, fuzzy_lr_distribution="gamma")
    return config.override(["fc", "type:Conv2d"], weight_splitting_activation_function=torch.relu, base_lr=2)


def test_the_fields_and_their_defaults_are_these() -> None:
    found = {field.name: field.default for field in dataclasses.fields(BioConfig)}
    assert found == DEFAULTS
    config = BioConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_the_tables_above_cover_every_field() -> None:
    assert set(CHANGED) | {"overrides"} == set(DEFAULTS) == {field for field, _, _ in BAD}
    assert all(CHANGED[name] != DEFAULTS[name] for name in CHANGED)


@pytest.mark.parametrize(("field", "value"), CHANGED.items(), ids=CHANGED)
def test_a_good_value_is_kept(field: str, value: Any) -> None:
    assert getattr(BioConfig(**{field: value}, **WITH.get(field, {})), field) == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rejuvenation_selection": "proportion"}, "rejuvenation_turnover: expected a fraction for"),
        ({"rejuvenation_selection": "threshold"}, "rejuvenation_threshold: expected a fraction of the mean"),
        ({"rejuvenation_threshold": 0.1}, "rejuvenation_threshold: expected None for .*'probability'"),
        (
            {
                "rejuvenation_selection": "proportion",
                "rejuvenation_turnover": 0.2,
                "rejuvenation_threshold": 0.1,
            },
            "rejuvenation_threshold: expected None for .*'proportion'.* found 0.1",
        ),
        (
            {**WITH["rejuvenation_threshold"], "rejuvenation_threshold": 0.1, "rejuvenation_turnover": 0.2},
            "rejuvenation_turnover: expected None for .*'threshold'.* found 0.2",
        ),
    ],
)
def test_a_selection_of_weights_has_its_amount_and_no_other(fields: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BioConfig(**fields)
    with pytest.raises(OptionError, match=message):
        biofx.transform(nn.Sequential(nn.Linear(2, 3)), BioConfig().override("0", **fields))


@pytest.mark.parametrize(("field", "value", "expected"), BAD)
def test_a_bad_value_is_one_error_that_names_field_value_and_range(
    field: str, value: Any, expected: str
) -> None:
    with pytest.raises(OptionError) as caught:
        BioConfig(**{field: value})
    found = value.__name__ if isinstance(value, type) else repr(value)
    if field == "overrides" and isinstance(value, list):
        found = repr(value[0])
    message = str(caught.value)
    assert message.startswith(f"{field}: expected ")
    assert expected in message
    assert found in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value", "expected"), [bad for bad in BAD if bad[0] not in ("seed", "overrides")]
)
def test_a_bad_value_in_an_override_is_the_same_error(field: str, value: Any, expected: str) -> None:
    with pytest.raises(OptionError, match=f"^{field}: expected ") as caught:
        BioConfig().override("fc", **{field: value})
    assert expected in str(caught.value)


def test_a_distribution_may_be_given_by_its_name() -> None:
    assert BioConfig(fuzzy_lr_distribution="beta").fuzzy_lr_distribution is Distribution.BETA  # type: ignore[arg-type]


def test_an_activation_may_be_given_by_its_name() -> None:
    config = BioConfig.from_dict({"weight_splitting_activation_function": "torch.tanh"})
    assert config.weight_splitting_activation_function is torch.tanh


def test_a_misspelt_choice_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'uniform'"):
        BioConfig.from_dict({"fuzzy_lr_distribution": "unifrom"})


@pytest.mark.parametrize(
    "make", [BioConfig, BioConfig().replace, lambda **fields: BioConfig.from_dict(fields)]
)
def test_an_unknown_field_suggests_the_nearest(make: Any) -> None:
    with pytest.raises(
        OptionError, match="unknown field 'weight_splitting_gama'; did you mean 'weight_splitting_Gamma'"
    ):
        make(weight_splitting_gama=2)


def test_an_unknown_field_of_an_override_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match="unknown field 'bas_lr'; did you mean 'base_lr'"):
        BioConfig().override("fc", bas_lr=1)


def test_the_constructor_shows_its_fields() -> None:
    assert set(inspect.signature(BioConfig).parameters) == set(DEFAULTS)


def test_a_config_is_frozen_and_hashable() -> None:
    config = everything()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    assert hash(config) == hash(everything())
    assert config == everything()


def test_replace_changes_a_copy_and_checks_it() -> None:
    config = everything()
    changed = config.replace(seed=7)
    assert (config.seed, changed.seed) == (CHANGED["seed"], 7)
    assert changed.replace(seed=config.seed) == config
    with pytest.raises(OptionError, match=r"^seed: expected"):
        config.replace(seed=-1)


def test_override_changes_a_copy() -> None:
    config = BioConfig()
    changed = config.override("fc", base_lr=1)
    assert config.overrides == ()
    assert changed.overrides == (Override("fc", (("base_lr", 1.0),)),)


def test_the_last_override_wins() -> None:
    config = BioConfig(weight_splitting_Gamma=1)
    config = config.override("*", weight_splitting_Gamma=2, base_lr=0.5).override(
        "fc", weight_splitting_Gamma=4
    )
    gammas = [
        config.options_for(list(selectors))["weight_splitting_Gamma"]
        for selectors in [(), ("*",), ("fc",), ("*", "fc"), ("fc", "*")]
    ]
    assert gammas == [1, 2, 4, 4, 4]
    assert config.options_for(["*", "fc"])["base_lr"] == 0.5


def test_the_options_for_a_selector_are_found_in_any_of_its_spellings() -> None:
    config = BioConfig().override([nn.Conv2d, "fc"], base_lr=3)
    assert config.options_for([[nn.Conv2d, "fc"]])["base_lr"] == 3
    assert config.options_for([nn.Conv2d])["base_lr"] == 0.1


@pytest.mark.parametrize("field", ["seed", "overrides"])
def test_what_holds_for_the_whole_model_cannot_be_overridden(field: str) -> None:
    with pytest.raises(OptionError, match=f"{field} holds for the whole model"):
        BioConfig().override("fc", **{field: 1})


def test_an_override_without_options_is_refused() -> None:
    with pytest.raises(OptionError, match="override of 'fc' changes nothing"):
        BioConfig().override("fc")


def test_an_override_of_what_is_no_selector_is_refused() -> None:
    with pytest.raises(SelectorError, match="a selector is a name"):
        BioConfig().override(3, base_lr=1)  # type: ignore[arg-type]


def test_overrides_given_to_the_constructor_are_brought_into_the_same_form() -> None:
    given = [Override(["fc", nn.Linear], (("fuzzy_lr_distribution", "beta"),))]
    config = BioConfig(overrides=given)  # type: ignore[arg-type]
    assert config == BioConfig().override(["fc", nn.Linear], fuzzy_lr_distribution=Distribution.BETA)
    assert hash(config)


def test_a_dict_holds_every_field_as_a_plain_value() -> None:
    plain = everything().to_dict()
    assert set(plain) == set(DEFAULTS)
    assert type(plain["fuzzy_lr_distribution"]) is str
    assert plain["overrides"][0] == {
        "selector": "layer1.*",
        "weight_splitting_Gamma": 0,
        "fuzzy_lr_distribution": "gamma",
    }


@pytest.mark.parametrize("config", [BioConfig(), everything()], ids=["defaults", "everything"])
def test_a_config_comes_back_from_its_dict(config: BioConfig) -> None:
    assert BioConfig.from_dict(config.to_dict()) == config


def test_a_predicate_comes_back_from_the_dict() -> None:
    def is_first(candidate: Candidate) -> bool:
        return candidate.call == 0

    config = BioConfig().override(is_first, base_lr=1)
    assert BioConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("config", [BioConfig(), everything()], ids=["defaults", "everything"])
def test_a_config_comes_back_from_its_toml_file(tmp_path: Path, config: BioConfig) -> None:
    config.to_toml(tmp_path / "bio.toml")
    assert BioConfig.from_toml(tmp_path / "bio.toml") == config


@pytest.mark.parametrize("field", ["base_lr", "rejuvenation_turnover"])
def test_a_field_that_may_be_none_comes_back_as_none(tmp_path: Path, field: str) -> None:
    config = (
        BioConfig.from_dict({field: None}).override("fc", **{field: 0.5}).override("out", **{field: None})
    )
    config.to_toml(tmp_path / "bio.toml")
    found = BioConfig.from_toml(tmp_path / "bio.toml")
    assert found == config
    assert getattr(found, field) is None


@pytest.mark.parametrize(
    "selector",
    [
        'quote "inside"',
        "back\\slash",
        "Mäder.神経",
        "new\nline",
        "re:layer[12]\\..*",
        "#",
        "=",
        "[[overrides]]",
        [],
    ],
)
def test_an_odd_selector_comes_back_from_the_toml_file(tmp_path: Path, selector: Any) -> None:
    config = BioConfig().override(selector, base_lr=1)
    config.to_toml(tmp_path / "bio.toml")
    assert BioConfig.from_toml(str(tmp_path / "bio.toml")) == config


@pytest.mark.parametrize(
    "config",
    [
        BioConfig(weight_splitting_activation_function=lambda x: x),
        BioConfig().override("fc", weight_splitting_activation_function=lambda x: x),
        BioConfig().override(lambda candidate: True, base_lr=1),
    ],
    ids=["activation", "activation-override", "predicate"],
)
def test_what_no_text_can_carry_is_refused_and_leaves_the_old_file(tmp_path: Path, config: BioConfig) -> None:
    path = tmp_path / "bio.toml"
    path.write_text("seed = 3\n")
    with pytest.raises(OptionError, match=r"expected a (callable that a text|value that TOML) can"):
        config.to_toml(path)
    assert path.read_text() == "seed = 3\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["bio.toml"]


HOSTILE = {
    "no-toml": "weight_splitting_Gamma: 2",
    "huge": "#" + "x" * 2**20,
    "deep": "seed = " + "[" * 50_000,
    "unknown": "weight_splitting_Gama = 2",
    "wrong-type": 'seed = "many"',
    "too-long-number": "base_lr = 1" + "0" * 400,
    "date": "seed = 1979-05-27",
    "table": "[seed]\nx = 1",
    "overrides-number": "overrides = 3",
    "overrides-numbers": "overrides = [1, 2]",
    "overrides-table": "[overrides]\nselector = 'fc'",
    "no-selector": "[[overrides]]\nbase_lr = 1",
    "selector-number": "[[overrides]]\nselector = 3\nbase_lr = 1",
    "selector-empty": "[[overrides]]\nselector = ''\nbase_lr = 1",
    "selector-expression": "[[overrides]]\nselector = 're:['\nbase_lr = 1",
    "python-argument": "[[overrides]]\nselector = 'fc'\nself = 1",
    "nested-overrides": "[[overrides]]\nselector = 'fc'\noverrides = []",
    "system": "weight_splitting_activation_function = 'import:os:system'",
    "not-imported": "weight_splitting_activation_function = 'import:not_imported_module:x'",
    "antigravity": "weight_splitting_activation_function = 'antigravity.fly'",
    "override-system": "[[overrides]]\nselector='fc'\nweight_splitting_activation_function = 'os.system'",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_an_option_error_that_names_it_and_imports_nothing(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "bio.toml"
    path.write_text(content)
    with pytest.raises(OptionError):  # the reader itself is imported when it is first used
        BioConfig.from_toml(tmp_path / "missing.toml")
    before = set(sys.modules)
    with pytest.raises(OptionError) as caught:
        BioConfig.from_toml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert set(sys.modules) == before


@pytest.mark.parametrize("given", [3, "seed = 1", [("seed", 1)], None])
def test_a_dict_is_what_from_dict_takes(given: Any) -> None:
    with pytest.raises(OptionError, match="expected a mapping of field names to values, found"):
        BioConfig.from_dict(given)


@pytest.mark.parametrize(
    "given", [{1: 2}, {None: 2}, {("seed",): 2}, {"overrides": [{"selector": "fc", 1: 2}]}]
)
def test_a_key_that_is_no_text_is_an_unknown_field(given: Any) -> None:
    with pytest.raises(OptionError, match="unknown field"):
        BioConfig.from_dict(given)
