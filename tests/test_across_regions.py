"""What passes and audits say and do where Python stands between the graphs of a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig
from biofx.graph.regions import region_paths
from biofx.layers.sites import find_sites
from biofx.operators.sign_ops import constrain_sign
from biofx.operators.split_ops import pool_synapses
from biofx.passes import ConstrainSigns, ExpandUnits, FoldSplits

DALE = BioConfig(apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0.2)


class Block(nn.Module):
    """Three layers, for ``(batch, 4)``; also returns what is between the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        between = torch.relu(self.first(x))
        return self.last(torch.relu(self.middle(between))), between


class PlainBlock(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[0]


class Gate(nn.Module):
    """Decides by a value."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        found = self.block(x) if x.sum() > 0 else self.block(-x)
        return found[0] + found[1].sum() if isinstance(found, tuple) else found


class Model(nn.Module):
    """A part in the middle whose own forward stays in Python."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(4, 4), Gate(block)
        self.head, self.readout = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.readout(torch.relu(self.head(torch.relu(self.gate(torch.relu(self.stem(x)))))))


class Pooled(nn.Module):
    """Sums synapses itself, and gives the sums to a layer and to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = pool_synapses(self.first(x), gamma=2, channel_axis=-1)
        return self.last(pooled), pooled


def missed(report: biofx.Report, name: str) -> dict[str, str]:
    entry = next(entry for entry in report.passes if entry.name == name)
    return {remark.layer: remark.message for remark in entry.remarks if remark.kind == "missed"}


def close(left: nn.Module, right: nn.Module, x: Tensor) -> None:
    for given in (x, -x, x + 3, x - 3):
        torch.testing.assert_close(left(given), right(given))


def test_units_that_python_hands_over_are_not_known() -> None:
    captured = biofx.capture(Model(PlainBlock()))
    assert region_paths(captured) == ("gate.block",)
    graph = captured.graph
    groups = biofx.unit_groups(captured)
    assert captured.graph is graph
    reasons = set(groups.ends.values())
    assert "what feeds it is not known: Python calls 'gate.block'" in reasons
    assert "Python runs 'gate'" in reasons
    producers = {group.readers: group.producers for group in groups}
    assert producers["gate.block.middle.weight",] == ("gate.block.first.weight",)
    assert producers["head.weight",] == ("gate",)
    assert producers["gate.block.first.weight",] == ("gate_block_x",)


def test_signs_stop_at_the_ends_of_a_region(vectors: Tensor) -> None:
    bio_model, report = biofx.transform(Model(PlainBlock()), DALE)
    reasons = missed(report, "constrain-signs")
    assert reasons["gate.block.first"] == (
        "what feeds it is not known: Python calls 'gate.block'"
        " (constrain_inputs=False, in a config dales_constrain_inputs)"
        "; give example_inputs to have signs here"
    )
    assert reasons["gate.block.last"] == (
        "what follows it is not known: Python calls 'gate.block'"
        " (constrain_readout=False, in a config dales_constrain_readout)"
        "; give example_inputs to have signs here"
    )
    assert reasons["readout"].startswith("it is a readout")
    signed = {site.layer for site in find_sites(bio_model).found if site.has(constrain_sign)}
    assert signed == {"gate.block.middle", "head"}
    signs = bio_model.get_buffer("gate.block.first.bio_mod.sign")
    assert set(signs.tolist()) == {-1, 1}
    nn.init.normal_(bio_model.gate.block.middle.weight)
    seen: list[Tensor] = []
    kept = nn.functional.linear

    def watch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(weight)
        return kept(x, weight, bias)

    region: Any = bio_model.gate.block
    for node in region.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        node.target = watch
    region.recompile()
    bio_model(vectors)
    assert [bool((weight * signs >= 0).all()) for weight in seen if weight.shape == (6, 6)] == [True]


def test_signs_of_what_python_hands_over_are_the_regions_own_if_asked_for() -> None:
    config = DALE.replace(dales_constrain_inputs=True, dales_constrain_readout=True)
    bio_model, report = biofx.transform(Model(PlainBlock()), config)
    assert all(site.has(constrain_sign) for site in find_sites(bio_model).found)
    (told,) = (
        r.message for r in report.remarks if r.layer == "gate.block.first" and "presynaptic" in r.message
    )
    assert "its units begin at 'gate_block_x', because what feeds it is not known: Python calls" in told


def test_units_at_the_end_of_a_region_are_not_expanded(vectors: Tensor) -> None:
    model = Model(PlainBlock())
    bio_model, report = biofx.transform(model, passes=[ExpandUnits()])
    shapes = {path: tuple(p.shape) for path, p in bio_model.gate.block.named_parameters() if p.dim() == 2}
    assert shapes == {"first.weight": (12, 4), "middle.weight": (6, 12), "last.weight": (4, 6)}
    assert missed(report, "expand-units")["gate.block.last"] == (
        "whether more than a readout reads its units is not known: Python calls 'gate.block' "
        "(constrain_readout=False, in a config dales_constrain_readout)"
    )
    close(bio_model, model, vectors)
    every, _ = biofx.transform(model, passes=[ExpandUnits(constrain_readout=True)])
    assert tuple(every.gate.block.last.weight.shape) == (4, 12)
    close(every, model, vectors)


def test_units_that_python_is_given_besides_are_not_expanded(vectors: Tensor) -> None:
    model = Model(Block())
    bio_model, report = biofx.transform(model, passes=[ExpandUnits()])
    reasons = missed(report, "expand-units")
    assert reasons["gate.block.middle"] == "what reads its units is not known: Python calls 'gate.block'"
    assert reasons["gate.block.first"] == "what makes its units is not known: Python calls 'gate.block'"
    assert tuple(bio_model.gate.block.first.weight.shape) == (6, 4)
    close(bio_model, model, vectors)


def test_folding_sets_members_apart_where_a_region_ends(vectors: Tensor) -> None:
    model = Model(Pooled())
    bio_model, report = biofx.transform(model, passes=[FoldSplits()])
    entry = next(entry for entry in report.passes if entry.name == "fold-splits")
    assert "members are set apart for it: what follows is not known: Python calls 'gate.block'" in {
        remark.message for remark in entry.remarks
    }
    assert any(remark.kind == "applied" and remark.layer == "gate.block.last" for remark in entry.remarks)
    close(bio_model, model, vectors)


def test_a_layer_that_python_alone_calls_is_not_said_to_be_never_called(vectors: Tensor) -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.GRU(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(self.rnn(x)[0] if x.sum() > 0 else x)

    model = Remembers()
    bio_model, report = biofx.transform(model, DALE, opaque=["rnn"])
    assert missed(report, "constrain-signs")["rnn"] == (
        "only Python calls it, if anything does: the forward of the model runs in Python"
    )
    close(bio_model, biofx.transform(model, DALE, opaque=["rnn"]).graph_module, vectors)


def test_an_audit_sees_into_regions() -> None:
    bio_model, _ = biofx.transform(Model(PlainBlock()), DALE)
    before = bio_model.graph, bio_model.gate.block.graph
    audit = biofx.check(bio_model)
    assert audit.ok, str(audit)
    assert (bio_model.graph, bio_model.gate.block.graph) == before
    state = bio_model.gate.block.middle.bio_mod
    state.fuzzy_learning_rate_parameters.data.fill_(-1.0)
    assert {fault.layer for fault in biofx.check(bio_model).faults} == {"gate.block.middle"}


def test_an_audit_finds_a_region_that_runs_another_graph() -> None:
    bio_model, _ = biofx.transform(Model(PlainBlock()), DALE)
    region: Any = bio_model.gate.block
    (signed,) = region.graph.find_nodes(op="call_function", target=constrain_sign)
    signed.replace_all_uses_with(signed.args[0])
    region.graph.eliminate_dead_code()
    (fault,) = (fault for fault in biofx.check(bio_model).faults if fault.invariant == "graph")
    assert "get_submodule('gate.block').recompile()" in fault.message
    region.recompile()
    assert not [fault for fault in biofx.check(bio_model).faults if fault.invariant == "graph"]


def test_a_model_with_regions_is_saved_and_made_again(tmp_path: Path, vectors: Tensor) -> None:
    model = Model(PlainBlock())
    bio_model, _ = biofx.transform(model, DALE)
    with torch.no_grad():
        bio_model.gate.block.middle.weight.mul_(2)
    biofx.save(bio_model, tmp_path / "model.pt")
    again = biofx.load(tmp_path / "model.pt", copy.deepcopy(model))
    assert region_paths(again) == ("gate.block",)
    torch.testing.assert_close(again.state_dict(), bio_model.state_dict(), rtol=0, atol=0)
    for x in (vectors, -vectors):
        assert torch.equal(again(x), bio_model(x))
    other = Model(Block())
    with pytest.raises(biofx.errors.CheckpointError):
        biofx.load(tmp_path / "model.pt", other)


def test_a_recorded_model_is_loaded_into_one_that_was_recorded(tmp_path: Path, vectors: Tensor) -> None:
    model = Model(PlainBlock())
    inputs: tuple[tuple[Tensor], dict[str, Any]] = ((vectors,), {})
    bio_model, _ = biofx.transform(model, DALE, example_inputs=inputs)
    biofx.save(bio_model, tmp_path / "model.pt")
    with pytest.raises(biofx.errors.CheckpointError, match="example_inputs"):
        biofx.load(tmp_path / "model.pt", model)
    other = biofx.transform(Model(PlainBlock()), DALE, example_inputs=inputs).graph_module
    biofx.load(tmp_path / "model.pt", other)
    assert torch.equal(other(vectors), bio_model(vectors))


def test_a_model_with_regions_is_deployed_around_what_runs_in_python(vectors: Tensor) -> None:
    model = Model(PlainBlock())
    bio_model = biofx.transform(model, DALE).graph_module.eval()
    deployed = biofx.deploy(bio_model)
    assert type(deployed.get_submodule("gate")) is type(model.gate)
    for x in (vectors, -vectors):
        torch.testing.assert_close(deployed(x), bio_model(x))


def test_the_page_and_the_drawing_show_regions() -> None:
    report = biofx.transform(Model(PlainBlock()), DALE).report
    assert "gate.block.middle" in report.to_html()
    assert "gate_block_begin" in report.to_svg()
    assert report.after is not None
    assert "gate_block_middle" in report.after.by_name


def test_constraining_twice_finds_the_signs_that_are_there() -> None:
    bio_model, _ = biofx.transform(Model(PlainBlock()), DALE)
    result = biofx.transform(bio_model, passes=[ConstrainSigns()])
    assert (
        missed(result.report, "constrain-signs")["gate.block.middle"] == "its signs are constrained already"
    )


class Loop(nn.Module):
    """A recurrent network as a loop over time of any length, with a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_rec, self.w_out = nn.Linear(3, 10), nn.Linear(10, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Any:
        rate, outputs = x.new_zeros(x.shape[1], 10), []
        for step in x:
            rate = torch.relu(self.w_rec(rate) + self.w_in(step))
            outputs.append(self.w_out(rate))
        return torch.stack(outputs)


def test_regions_that_carry_the_signs_of_the_same_units_are_trained_and_deployed() -> None:
    torch.manual_seed(0)
    signs, x = [1] * 8 + [-1] * 2, torch.randn(5, 4, 3)
    config = DALE.replace(dales_constrain_readout=True, weight_mask_self_connections=False)
    bio_model, _ = biofx.transform(
        Loop(), config.override("w_rec", dales_signs=signs), example_inputs=((x,), {})
    )
    assert set(bio_model.region_paths) == {"w_in", "w_rec", "w_out"}
    optimizer = torch.optim.SGD(bio_model.parameters(), lr=0.1)
    for length in (5, 3, 8):
        optimizer.zero_grad()
        bio_model(torch.randn(length, 4, 3)).square().mean().backward()
        optimizer.step()
    assert biofx.check(bio_model).ok
    deployed = biofx.deploy(bio_model)
    assert torch.equal(deployed(x), bio_model.eval()(x))
    for name in ("w_rec", "w_out"):
        weight = deployed.get_parameter(f"{name}.weight")
        assert bool((weight != 0).any(0).all())
        assert not bool((weight * torch.tensor(signs) < 0).any())
    assert not bool(deployed.get_parameter("w_rec.weight").diagonal().any())
