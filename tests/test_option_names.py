"""Each option of a pass is named in messages as the config names it, too."""

from __future__ import annotations

import re

from torch import nn

import biofx
from biofx.config import config_options
from biofx.option_names import named_option
from biofx.passes import ConstrainSigns, MaskWeights, SplitWeights


def test_every_option_of_a_pass_has_the_name_of_its_field() -> None:
    for field, declared in config_options().items():
        for name, feeds in declared.feeds.items():
            if feeds.option != "enabled":
                assert named_option(name, feeds.option, 3) == f"{feeds.option}=3, in a config {field}"


def test_remarks_name_the_option_of_the_pass_and_the_field_of_the_config() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    passes = (MaskWeights(), SplitWeights(gamma=3), ConstrainSigns())
    report = biofx.transform(model, passes=passes).report
    messages = [remark.message for remark in report.remarks if remark.kind == "missed"]
    for option, field in (
        ("density=1", "weight_density"),
        ("gamma=3", "weight_splitting_Gamma"),
        ("constrain_inputs=False", "dales_constrain_inputs"),
        ("constrain_readout=False", "dales_constrain_readout"),
    ):
        assert any(f"({option}, in a config {field})" in message for message in messages)
    options = {feeds.option for declared in config_options().values() for feeds in declared.feeds.values()}
    for message in messages:
        for name in re.findall(r"\b(\w+)=", message):
            assert name not in options or f"{name}=" in message.partition("in a config")[0], message


def test_a_note_on_other_rewrites_is_no_reason() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    report = biofx.transform(model, biofx.BioConfig(weight_splitting_Gamma=2)).report
    (split, _, _) = report.passes
    odd = next(remark for remark in split.remarks if remark.layer == "2")
    assert odd.note == "for equal rates 2 times the step of a plain layer, since it reads sums of 2"
    assert odd.message == f"{odd.own_message}; {odd.note}"
    assert report.coverage is not None
    reasons = [reason for reach in report.coverage.mechanisms for reason in reach.reasons]
    reasons += [*split.coverage(report.graphs()[0]).reasons]
    assert any("Γ does not divide its 5 output channels" in reason for reason in reasons)
    assert not any("for equal rates" in reason for reason in reasons)
