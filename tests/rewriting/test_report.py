"""What a report tells: every node that differs, every candidate left alone, in three forms."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import rich
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.fx import GraphModule

import biofx
from biofx import BioConfig, Remark, Report
from biofx.graph.changes import Change, Snapshot, compare, snapshot_of
from biofx.rewriting.folded_remarks import fold_remarks
from biofx.rewriting.remarks import PassReport, applied, missed
from biofx.rewriting.report import SCHEMA
from biofx.select import Candidate

FULL = BioConfig(
    weight_splitting_Gamma=2, apply_dales_principle=True, weight_splitting_activation_function=torch.relu
)


class Repeated(nn.Module):
    """A layer called twice, tied weights, a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.spare = nn.Conv2d(1, 2, 3)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.tied(self.first(self.first(x)))))  # type: ignore[no-any-return]


@pytest.fixture(params=["residual_net", "mlp", "repeated"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "repeated":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Repeated()
    found: nn.Module = request.getfixturevalue(request.param)
    return found


def described(graph_module: GraphModule) -> dict[str, tuple[Any, ...]]:
    """Each node of a graph by name, as plain values: an account of its own, not the library's."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return f"%{value.name}"
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return repr(value)

    return {n.name: (n.op, repr(n.target), plain(n.args), plain(n.kwargs)) for n in graph_module.graph.nodes}


def differences(before: GraphModule, after: GraphModule) -> dict[str, str]:
    old, new = described(before), described(after)
    found = dict.fromkeys(new.keys() - old.keys(), "created")
    found |= dict.fromkeys(old.keys() - new.keys(), "erased")
    for name in old.keys() & new.keys():
        if old[name][:2] != new[name][:2]:
            found[name] = "replaced"
        elif old[name] != new[name]:
            found[name] = "rewired"
    return found


@pytest.mark.parametrize("config", [BioConfig(), FULL, FULL.replace(dales_constrain_readout=True)])
def test_a_report_accounts_for_every_node_that_differs(model: nn.Module, config: BioConfig) -> None:
    bio, report = biofx.transform(model, config)
    expected = differences(biofx.capture(model), bio)
    assert expected
    assert {change.node: change.kind for change in report.changes} == expected
    assert len(report.changes) == len(expected)
    lines = biofx.format_graph(bio).splitlines()
    assert all(change.after in lines for change in report.changes if change.after is not None)


def test_each_pass_accounts_for_the_nodes_it_changed(model: nn.Module) -> None:
    pipeline = biofx.rewriting.compile_config(FULL)
    graph_module = biofx.capture(model)
    report = pipeline(graph_module).report
    for entry, told in zip(pipeline.passes, report.passes, strict=True):
        result = entry(graph_module).graph_module
        assert {change.node: change.kind for change in told.changes} == differences(graph_module, result)
        graph_module = result


def test_an_erased_node_is_accounted_for(mlp: nn.Module) -> None:
    whole = snapshot_of(biofx.capture(mlp))
    shorter = Snapshot(
        {name: value for name, value in whole.operations.items() if name != "_1"},
        {name: value for name, value in whole.lines.items() if name != "_1"},
    )
    assert compare(whole, shorter) == [Change("erased", "_1", "_1 = self.1(_0)  # ReLU", None)]


def test_every_change_belongs_to_a_candidate_that_was_rewritten(model: nn.Module) -> None:
    report = biofx.transform(model, FULL).report
    for entry in report.passes:
        rewritten = {remark.node for remark in entry.remarks if remark.kind == "applied"}
        assert {change.cause for change in entry.changes} == rewritten
    assert all(change.cause for change in report.changes)


class Shifted(nn.Module):
    """Sets the members of a connection apart where nothing that a pass speaks of stands beside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(torch.relu(self.first(x))) + self.shift)  # type: ignore[no-any-return]


def test_a_change_behind_nodes_that_stay_belongs_to_the_rewrite_before_them() -> None:
    report = biofx.transform(Shifted(), BioConfig(weight_splitting_Gamma=2)).report
    because = {change.node: change.cause for change in report.passes[-1].changes}
    assert {"tanh_spread", "add", "first_folded"} <= set(because)
    assert "tanh" not in because
    assert because["add"] == because["tanh_spread"] == because["relu"] == "first"


def test_every_layer_has_a_remark_of_every_pass(model: nn.Module) -> None:
    captured = biofx.capture(model)
    layers = (nn.Linear, nn.Conv2d)

    def calls_of(*kinds: type[nn.Module]) -> set[str]:
        return {
            node.name
            for node in captured.graph.nodes
            if node.op == "call_module" and isinstance(captured.get_submodule(str(node.target)), kinds)
        }

    targets = {str(node.target) for node in captured.graph.nodes}
    never = {
        path for path, module in model.named_modules() if isinstance(module, layers) and path not in targets
    }
    report = biofx.transform(model, FULL).report
    assert len(report.passes) == 4
    for entry in report.passes:
        candidates = calls_of(*layers, *((nn.BatchNorm2d,) if entry.name == "constrain-signs" else ()))
        found = sorted(remark.node for remark in entry.remarks if remark.node is not None)
        # a fold has something to say of what lies between layers too
        kept = [node for node in found if node in candidates or entry.name != "fold-splits"]
        assert kept == sorted(candidates)
        assert {remark.layer for remark in entry.remarks if remark.node is None} == never
        assert all(remark.message for remark in entry.remarks)
        assert entry.applied + entry.missed == len(entry.remarks)


def test_modified_means_that_the_printed_graph_differs(model: nn.Module) -> None:
    before = biofx.format_graph(biofx.capture(model))
    for config in (BioConfig(), BioConfig(fuzzy_learning_rate_factor_nu=0), FULL):
        bio, report = biofx.transform(model, config)
        assert report.modified is (biofx.format_graph(bio) != before)


# the text


def test_the_text_of_a_report(model: nn.Module, golden: Callable[[str, str], None]) -> None:
    golden(f"test_report_{type(model).__name__.lower()}", str(biofx.transform(model, FULL).report))


def test_the_text_is_the_same_every_time_and_holds_no_times(model: nn.Module) -> None:
    def selected(candidate: Candidate) -> bool:
        return candidate.name != "output"

    first, second = (biofx.transform(model, FULL, only=[selected]).report for _ in range(2))
    assert str(first) == str(second)
    slower = dataclasses.replace(
        first, passes=tuple(dataclasses.replace(e, seconds=99.0) for e in first.passes)
    )
    assert str(slower) == str(first)
    assert " at 0x" not in str(first)


def test_the_text_has_a_line_for_remarks_that_say_the_same_and_for_each_change(model: nn.Module) -> None:
    report = biofx.transform(model, FULL).report
    lines = str(report).splitlines()
    remarks = [f"  {alike}" for entry in report.passes for alike in fold_remarks(entry.remarks)]
    changes = sum(len(entry.changes) for entry in report.passes)
    assert [line for line in lines if line.startswith(("  applied", "  missed"))] == remarks
    assert len(lines) == 1 + len(report.passes) + len(remarks) + changes


@pytest.mark.parametrize(
    ("report", "summary"),
    [
        (Report("Net", (), ()), "no pass ran: every mechanism is off"),
        (Report("Net", (PassReport("p", "p", (), ()),), ()), "the graph is unchanged"),
        (
            Report(
                "Net",
                (PassReport("p", "p", (), ()),),
                tuple(Change(kind, "n", "a", "b") for kind in ("created", "erased", "created", "rewired")),
            ),
            "2 created, 1 rewired, 1 erased nodes",
        ),
    ],
)
def test_the_summary_counts_what_differs(report: Report, summary: str) -> None:
    assert report.summary() == summary
    assert str(report).splitlines()[0] == f"Net: {summary}"


@pytest.mark.parametrize(
    ("node", "layer", "subject"),
    [
        ("fc", "fc", "fc"),
        ("_0", "0", "0"),
        ("_0", "", "_0"),
        ("layer1_0_conv1", "layer1.0.conv1", "layer1.0.conv1"),
        ("fc_1", "fc", "fc_1 (fc)"),
        (None, "spare", "spare"),
    ],
)
def test_a_remark_names_its_candidate(node: str | None, layer: str, subject: str) -> None:
    remark = Remark("missed", node, layer, "why")
    assert remark.subject == subject
    assert str(remark) == f"missed  {subject}: why"


def test_a_remark_is_made_from_a_node_and_its_numbers(mlp: nn.Module) -> None:
    node = next(iter(biofx.capture(mlp).graph.nodes))
    assert applied(node, "0", "done", count=3) == Remark("applied", "input_1", "0", "done", {"count": 3})
    assert missed(None, "0", "never") == Remark("missed", None, "0", "never", {})


# JSON


CHANGE = {"kind", "node", "before", "after", "because"}


def test_the_json_form_is_as_documented(model: nn.Module) -> None:
    report = biofx.transform(model, FULL).report
    found = json.loads(report.to_json())
    assert found == json.loads(report.to_json(indent=None)) == json.loads(json.dumps(report.to_dict()))
    assert set(found) == {"schema", "model", "modified", "changes", "unmet", "coverage", "passes"}
    assert found["schema"] == SCHEMA == "biofx.report/1"
    assert (found["model"], found["modified"]) == (type(model).__name__, True)
    assert len(found["changes"]) == len(report.changes)
    for change in [*found["changes"], *(change for entry in found["passes"] for change in entry["changes"])]:
        assert set(change) == CHANGE
        assert change["kind"] in ("created", "erased", "rewired", "replaced")
        assert (change["before"] is None) == (change["kind"] == "created")
        assert (change["after"] is None) == (change["kind"] == "erased")
    for entry, told in zip(found["passes"], report.passes, strict=True):
        assert set(entry) == {"name", "text", "seconds", "applied", "missed", "remarks", "changes"}
        assert (entry["name"], entry["text"], entry["seconds"]) == (told.name, told.text, told.seconds)
        assert entry["seconds"] > 0
        kinds = [remark["kind"] for remark in entry["remarks"]]
        assert (kinds.count("applied"), kinds.count("missed")) == (entry["applied"], entry["missed"])
        for remark, original in zip(entry["remarks"], told.remarks, strict=True):
            assert remark == {
                "kind": original.kind,
                "node": original.node,
                "layer": original.layer,
                "message": original.message,
                "details": dict(original.details),
            }


def test_the_docstring_names_every_key_and_the_version(model: nn.Module) -> None:
    from biofx.rewriting import report as module

    named = set(re.findall(r"``\"?([\w./]+)\"?``", str(module.__doc__)))
    found = biofx.transform(model, FULL).report.to_dict()
    entry = found["passes"][0]
    assert {*found, *entry, *entry["remarks"][0], *CHANGE, SCHEMA} <= named


def test_editing_the_dict_leaves_the_report_alone(mlp: nn.Module) -> None:
    report = biofx.transform(mlp, FULL).report
    before = report.to_json()
    plain = report.to_dict()
    plain["changes"][0]["kind"] = "edited"
    plain["passes"][0]["changes"][0]["kind"] = "edited"
    plain["passes"][0]["remarks"][0]["details"]["gamma"] = "edited"
    assert report.to_json() == before


def test_a_text_outside_ascii_stays_readable_in_json() -> None:
    report = Report("Mäder", (), ())
    assert '"model": "Mäder"' in report.to_json()


# rich


def rendered(report: Report, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(report)
    return console.export_text()


def test_the_rich_form_fits_80_columns_and_shows_every_change_and_remark(model: nn.Module) -> None:
    report = biofx.transform(model, FULL).report
    shown = rendered(report)
    assert max(map(len, shown.splitlines())) <= 80
    words = shown.replace("\n", " ").split()
    names = {word.rstrip(",") for word in words}
    for entry in report.passes:
        assert {change.node for change in entry.changes} <= names
        for remark in entry.remarks:
            assert set(remark.subject.split()) <= set(words)
            assert set(remark.message.split()) <= set(words)
    assert shown.count("✓") == sum(entry.applied for entry in report.passes)
    assert shown.count("·") == sum(entry.missed for entry in report.passes)


def test_the_rich_form_lists_a_change_that_belongs_to_no_candidate() -> None:
    changes = (Change("erased", "stray", "stray = input", None),)
    report = Report("Net", (PassReport("p", "p", (), changes),), changes)
    assert "erased: stray" in rendered(report)


def test_a_long_name_is_folded_not_cut() -> None:
    name = "encoder_" + "layer_" * 30 + "end"
    report = Report("Net", (PassReport("p", "p", (Remark("missed", name, "", "why"),), ()),), ())
    shown = rendered(report)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    folded = [re.split(r"\s+", line.strip("· ").strip())[0] for line in shown.splitlines()]
    assert name in "".join(folded)


def test_markup_in_the_names_of_users_is_not_interpreted() -> None:
    remarks = (
        Remark("applied", "[red]node[/red]", "[bold]layer", "[green]message[/]"),
        Remark("missed", "n", "", ":smile: [/nothing]"),
    )
    changes = (Change("created", "[blue]new", None, "x", "[red]node[/red]"),)
    report = Report("[i]Model", (PassReport("p", "p{only=[red]}", remarks, changes),), changes)
    shown = rendered(report)
    for text in (
        "[i]Model",
        "p{only=[red]}",
        "[red]node[/red]",
        "[bold]layer",
        "[green]message[/]",
        "[blue]new",
    ):
        assert text in shown
    assert ":smile: [/nothing]" in shown


def test_a_module_named_like_markup_is_printed_as_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    graph = biofx.capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    report = biofx.passes.ScaleGradients(only=[])(graph).report
    remarks = tuple(dataclasses.replace(remark, layer="block.[red]") for remark in report.remarks)
    told = dataclasses.replace(report, passes=(dataclasses.replace(report.passes[0], remarks=remarks),))
    rich.print(told)
    assert capsys.readouterr().out.count("(block.[red])") == 2
