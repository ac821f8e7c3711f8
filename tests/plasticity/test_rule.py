"""What an entry of a schedule may be given."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import biofx
from biofx import Rule
from biofx.config import BioConfig, config_options, rule_options
from biofx.errors import OptionError, SelectorError


def test_an_option_may_be_named_as_the_rule_or_the_config_does() -> None:
    short, long = (
        Rule("synaptic_scaling", every=10, rate=0.2),
        Rule("synaptic_scaling", 10, synaptic_scaling_rate=0.2),
    )
    assert short == long == Rule("synaptic_scaling", 10, options={"rate": 0.2})
    assert hash(short) == hash(long)
    assert short.options == (("synaptic_scaling_rate", 0.2),)
    assert dataclasses.replace(short, every=5) == Rule("synaptic_scaling", every=5, rate=0.2)
    assert str(short) == "synaptic_scaling every 10 (rate=0.2)"
    assert repr(short) == "Rule('synaptic_scaling', every=10, rate=0.2)"
    assert eval(repr(short)) == short
    assert repr(Rule("crystallize")) == "Rule('crystallize')"
    shown = Rule(
        "crystallize", until=9, only=["layer4.*", nn.Conv2d], exclude="fc", dampening=0.5, threshold=1
    )
    assert str(shown) == (
        "crystallize until 9 on 'layer4.*', 'type:torch.nn.modules.conv.Conv2d' not on 'fc' "
        "(dampening=0.5, threshold=1.0)"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "synaptic_scaling",
            {"rte": 0.2},
            "rule 'synaptic_scaling' has no option 'rte'; did you mean 'rate'",
        ),
        ("synaptic_scaling", {"rte": 0.2}, r"options: rate \(synaptic_scaling_rate\)$"),
        (
            "synaptic_scaling",
            {"turnover": 0.2},
            r"has no option 'turnover'; options: rate \(synaptic_scaling_rate\)$",
        ),
        (
            "crystallize",
            {"seed": 3},
            r"rule 'crystallize' does not read 'seed': set it in the config, BioConfig\(seed=…\)",
        ),
        (
            "synaptic_scaling",
            {"rate": 1.5},
            r"rule 'synaptic_scaling': synaptic_scaling_rate: expected a number in \(0, 1\], found 1.5",
        ),
        (
            "rejuvenate_weights",
            {"selection": "proprtion"},
            "rejuvenation_selection: expected one of probability, proportion, threshold, found 'proprtion'; "
            "did you mean 'proportion'",
        ),
        (
            "synaptic_scaling",
            {"rate": 0.1, "synaptic_scaling_rate": 0.2},
            "synaptic_scaling_rate is given twice",
        ),
        (
            "synaptic_scalin",
            {"rate": 0.1},
            "'synaptic_scalin' has no options, found 'rate'; did you mean 'syn",
        ),
        (
            "enforce_dales_principle",
            {"rate": 0.1},
            "rule 'enforce_dales_principle' has no options, found 'rate'",
        ),
    ],
)
def test_unknown_options_and_wrong_values_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        Rule(name, **options)


def test_what_is_no_selector_is_refused() -> None:
    with pytest.raises(SelectorError, match=r"rule 'crystallize': only: selector 're:\[' is not a regular"):
        Rule("crystallize", only="re:[")
    with pytest.raises(SelectorError, match="rule 'crystallize': exclude: a selector is a name"):
        Rule("crystallize", exclude=3)  # type: ignore[arg-type]


def test_each_field_that_no_pass_reads_belongs_to_a_rule() -> None:
    read = {field for field, declared in config_options().items() if declared.feeds or declared.rules}
    assert set(config_options()) - read == {"fuzzy_lr_dynamic"}
    known = set(biofx.BioModule.exposed_functions)
    for field, declared in config_options().items():
        assert set(declared.rules) <= known, field
    taken = {field.name for field in dataclasses.fields(Rule)}
    for rule in known:
        options = rule_options(rule)
        count = sum(rule in declared.rules for declared in config_options().values())
        assert len(options) == count, f"two options of {rule} have one name"
        assert taken.isdisjoint(options), rule
        assert set(options).isdisjoint(set(config_options()) - set(options.values())), rule


@settings(max_examples=200, deadline=None)
@given(*[st.tuples(st.integers(1, 7), st.integers(0, 9), st.none() | st.integers(1, 30))] * 2)
def test_the_first_step_that_two_entries_share_is_found(one: Any, other: Any) -> None:
    rules = [
        Rule("halve", every, after, None if length is None else after + length)
        for every, after, length in (one, other)
    ]
    expected = next((step for step in range(200) if all(rule.is_due(step) for rule in rules)), None)
    assert rules[0].first_step_with(rules[1]) == expected
    assert rules[1].first_step_with(rules[0]) == expected


def test_help_of_the_config_names_the_options_of_rules() -> None:
    assert BioConfig.__doc__ is not None
    assert "synaptic_scaling_rate: How much" in BioConfig.__doc__
    assert 'At a rule: Rule("synaptic_scaling", rate=…).' in " ".join(BioConfig.__doc__.split())
