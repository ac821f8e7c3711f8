"""What a shell and a notebook show of what biofx makes: short, of use, and escaped."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import biofx
from biofx import BioConfig, Distribution, Rule
from biofx.checkpoints import Checkpoint
from biofx.graph.changes import Change
from biofx.rewriting.folded_remarks import fold_remarks
from biofx.rewriting.remarks import PassReport, Remark
from biofx.rewriting.report import Report

SHORT = 2000
FULL = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def large() -> Any:
    """A model of 300 layers, its report, and a run of it."""
    layers = [layer for _ in range(150) for layer in (nn.Linear(4, 4), nn.ReLU())]
    bio, report = biofx.transform(nn.Sequential(*layers), FULL)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    rules = [Rule("synaptic_scaling", every=300, after=number, only=str(2 * number)) for number in range(30)]
    monitor = biofx.Monitor(activity=False)
    return bio, report, biofx.attach(bio, optimizer, rules, observers=[monitor]), monitor


# configs


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (BioConfig(), "BioConfig()"),
        (FULL, "BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)"),
        (
            BioConfig(fuzzy_lr_distribution=Distribution.NORMAL, base_lr=None).override(
                ["0", nn.Linear], dales_signs=[1, -1], fuzzy_lr_distribution="beta"
            ),
            "BioConfig(fuzzy_lr_distribution='normal', base_lr=None).override(['0', "
            "'type:torch.nn.modules.linear.Linear'], dales_signs=(1, -1), fuzzy_lr_distribution='beta')",
        ),
        (
            BioConfig(weight_splitting_activation_function=torch.tanh),
            "BioConfig(weight_splitting_activation_function='torch.tanh')",
        ),
    ],
)
def test_a_config_shows_what_differs_and_can_be_made_again_from_that(config: BioConfig, shown: str) -> None:
    assert repr(config) == shown
    assert eval(shown) == config


def test_functions_without_a_name_are_named_in_a_config() -> None:
    def is_first(candidate: Any) -> bool:
        return False

    config = BioConfig(weight_splitting_activation_function=lambda x: x).override(is_first, base_lr=0.5)
    assert re.fullmatch(
        r"BioConfig\(weight_splitting_activation_function=<.*<lambda>>\)"
        r"\.override\(<.*is_first>, base_lr=0\.5\)",
        repr(config),
    )


def test_a_config_in_a_notebook_has_changes_above_and_all_fields_folded() -> None:
    page = FULL.override("a<b", base_lr=0.5)._repr_html_()
    above, _, below = page.partition("<details>")
    assert "weight_splitting_Gamma" in above
    assert "crystal_thresh" not in above
    assert "crystal_thresh" in below
    assert "a&lt;b" in above
    assert "a<b" not in page
    assert "<script" not in page
    ElementTree.fromstring(f"<div>{page}</div>")


# reports


def test_what_transform_and_attach_return_is_short(large: Any) -> None:
    bio, report, plasticity, monitor = large
    result = biofx.transform(small(), FULL)
    optimizer = torch.optim.AdamW(result.graph_module.parameters())
    little = biofx.attach(result.graph_module, optimizer, [Rule("crystallize", every=10)])
    groups = biofx.unit_groups(bio)
    for shown in (result, result.report, FULL, little, report, plasticity, monitor, groups, biofx.check(bio)):
        assert len(repr(shown)) < SHORT, type(shown)
    assert repr(result.report) == f"<Report of Sequential: {result.report.summary()}>"
    assert repr(result).startswith("PassResult(graph_module=<Sequential with 26 nodes>, report=<Report of")
    assert "crystallize every 10" in repr(little)
    assert "and 20 more" in repr(plasticity)
    assert "Sequential with 150 weights: 0 records, every 1" in repr(monitor)


def test_a_summary_says_what_was_asked_done_and_missed() -> None:
    report = biofx.transform(small(), FULL).report
    said = "split-weights 2 of 3, constrain-signs 1 of 3, scale-gradients 3 of 3, fold-splits 5 of 5"
    assert said in report.summary()
    unmet = biofx.transform(nn.Linear(3, 2), BioConfig(apply_dales_principle=True)).report
    assert unmet.summary().endswith("; asked for and not there: 1")


def remark(layer: str, node: str, message: str = "no", kind: Any = "missed") -> Remark:
    return Remark(kind, node, layer, message)


def test_equal_reasons_and_calls_of_a_layer_are_one_line() -> None:
    remarks = [
        remark("a", "_a", "done", "applied"),
        *(remark(f"l.{number}", f"l_{number}") for number in range(6)),
        remark("c", "_c", "other"),
        remark("c", "_c_1", "other"),
        remark("d", "_d", "other"),
    ]
    assert [str(each) for each in fold_remarks(remarks)] == [
        "applied a: done",
        "missed  l.0, l.1, l.2 and 3 more: no",
        "missed  _c, _c_1 (c): other",
        "missed  d: other",
    ]
    folded = [each for group in fold_remarks(remarks) for each in group.remarks]
    assert sorted(map(id, folded)) == sorted(map(id, remarks))


def test_a_large_report_is_folded_in_text_and_bounded_in_a_notebook(large: Any) -> None:
    _, report, _, _ = large
    page = report._repr_html_()
    assert len(page.encode()) < 200_000
    assert "<script" not in page
    assert "report.to_html" in page
    assert "more lines" in page
    assert report.summary() in page
    ElementTree.fromstring(f"<div>{page}</div>")
    lines = [line for line in str(report).splitlines() if line.startswith(("  applied", "  missed"))]
    assert len(lines) < len(report.remarks) - 100


def test_a_report_of_many_long_messages_stays_bounded() -> None:
    remarks = tuple(remark(f"l.{number}" * 50, f"l_{number}", f"{number} <b>" * 99) for number in range(500))
    passes = tuple(PassReport(f"pass-{number}", "p" * 900, remarks, ()) for number in range(20))
    report = Report("Net", passes, (Change("created", "n", None, "n"),))
    page = report._repr_html_()
    assert len(page.encode()) < 200_000
    assert "<b>" not in page
    assert "pass-19" in report.summary()


def test_a_small_report_has_its_graph_in_a_notebook() -> None:
    page = biofx.transform(small(), FULL).report._repr_html_()
    assert page.count("<svg") == 1
    assert page.count("<details>") == 6  # reach, four passes, the graph
    assert "dales_constrain_inputs" in page


# models


def test_a_small_model_is_drawn_and_a_large_one_is_not(large: Any) -> None:
    bio, _ = biofx.transform(small(), FULL)
    picture = bio._repr_svg_()
    assert picture is not None
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("svg")
    for node in bio.graph.nodes:
        assert node.name[:8] in picture
    assert large[0]._repr_svg_() is None
    assert copy.deepcopy(bio)._repr_svg_() == picture


def test_a_model_shows_at_each_layer_what_it_has() -> None:
    torch.manual_seed(0)
    config = BioConfig(
        apply_dales_principle=True,
        fuzzy_lr_distribution=Distribution.LOGNORMAL,
        fuzzy_learning_rate_factor_nu=0.3,
        weight_density=0.5,
        unit_turnover="redo",
        consolidation="elastic",
    )
    bio, _ = biofx.transform(small(), config)
    for model in (bio, copy.deepcopy(bio), pickle.loads(pickle.dumps(bio))):
        text = " ".join(repr(model).split())
        assert (
            "(bio_mod): BioModule( rates lognormal ν=0.3, 6 signs, masked, 6 units turn over (redo)" in text
        )
        assert "reads signs" in text
        assert "consolidation elastic" in text
    states = [module for module in bio.modules() if isinstance(module, biofx.BioModule)]
    assert len(states) == 6
    assert all(state.extra_repr() in repr(bio) for state in states)
    plain, _ = biofx.transform(nn.Linear(3, 2), BioConfig(fuzzy_lr_distribution=Distribution.BASELINE))
    assert "BioModule()" in repr(plain)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "rates uniform ν=0.16"),
        ({"fuzzy_lr_dtype": "seed"}, "rates uniform ν=0.16 from the seed"),
        ({"fuzzy_lr_dtype": "bfloat16"}, "rates uniform ν=0.16 (bfloat16)"),
        ({"fuzzy_lr_distribution": "log_uniform"}, "rates log_uniform in [0.001, 10]"),
    ],
)
@pytest.mark.parametrize("door", ["transform", "converter", "pass"])
def test_rates_are_shown_as_they_were_drawn(door: str, options: dict[str, Any], shown: str) -> None:
    config = BioConfig(**options)
    made: Any
    if door == "converter":
        made = biofx.BioConverter(config)(small())
    elif door == "pass":
        names = {"fuzzy_lr_dtype": "dtype", "fuzzy_lr_distribution": "distribution"}
        fields = {names[name]: value for name, value in options.items()}
        made, _ = biofx.transform(small(), passes=biofx.passes.ScaleGradients(**fields))
    else:
        made, _ = biofx.transform(small(), config)
    assert made.get_submodule("0.bio_mod").extra_repr() == shown
    meta = made.to("meta")
    assert meta.get_submodule("0.bio_mod").extra_repr() == shown


# monitors, groups, checkpoints


def test_monitors_groups_and_checkpoints_say_what_they_hold(tmp_path: Path) -> None:
    bio, _ = biofx.transform(small(), FULL)
    optimizer = torch.optim.AdamW(bio.parameters())
    monitor = biofx.Monitor(every=2, path=tmp_path / "run.jsonl")
    assert repr(monitor).startswith("<Monitor of no model yet: 0 records, every 2, to JsonLines")
    plasticity = biofx.attach(bio, optimizer, observers=[monitor])
    for _ in range(3):
        bio(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    assert "Sequential with 3 weights: 2 records of steps 0 to 2, every 2" in repr(monitor)
    biofx.save(bio, tmp_path / "run.pt", optimizer=optimizer, plasticity=plasticity, extra={"epoch": 3})
    shown = repr(Checkpoint.read(tmp_path / "run.pt"))
    assert re.fullmatch(
        r"<Checkpoint of Sequential, biofx \S+, torch \S+: \d+ tensors, optimizer, attachment at step 3, "
        r"extra: epoch>",
        shown,
    )
    groups = biofx.unit_groups(bio)
    assert repr(groups).startswith(f"<UnitGroups, {len(groups)}: ")
    assert str(next(iter(groups))) in repr(groups)
    page = groups._repr_html_()
    assert page.count("<tr>") > len(groups)
    ElementTree.fromstring(f"<div>{page}</div>")
