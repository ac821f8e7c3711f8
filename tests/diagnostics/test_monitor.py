"""The monitor: each of its numbers against one computed here, the files it writes, its picture, its table."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx import BioConfig, Monitor, OptionError, Rule
from biofx.diagnostics import LayerRecord, StepRecord, UnitActivity
from biofx.diagnostics.monitor_plot import series_of
from biofx.diagnostics.monitor_records import HISTOGRAM_EDGES, Sink, short_name
from biofx.errors import InputError, PlasticityError
from biofx.passes import ConstrainSigns
from biofx.plasticity.optimizer_step import LayerStep

DALE = BioConfig(apply_dales_principle=True, dales_constrain_inputs=True, dales_constrain_readout=True)
TARGETS = torch.tensor([0, 1, 1, 0, 1])


def backward(model: nn.Module, inputs: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(inputs), TARGETS).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, steps: int) -> None:
    for _ in range(steps):
        backward(model, inputs)
        optimizer.step()


def sgd(model: nn.Module, learning_rate: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=learning_rate, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")}


def state_of(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path.removesuffix(".weight")).bio_mod


def factors(model: nn.Module, path: str) -> Tensor:
    found: Tensor = state_of(model, path).fuzzy_learning_rate_parameters
    return found


def layer_record(**fields: Any) -> LayerRecord:
    made: dict[str, Any] = {
        "synapses": 8,
        "factor_mean": 1.0,
        "factor_std": 0.1,
        "factor_histogram": (0,) * 7 + (4, 4) + (0,) * 7,
        "crystallized": 2,
        "touched": {},
        "excitation": 3.0,
        "inhibition": 2.0,
        "gradient_norm": 0.5,
        "update_norm": 0.25,
    }
    return LayerRecord(**made | fields)


def unit_activity(**fields: Any) -> UnitActivity:
    made: dict[str, Any] = {
        "units": 8,
        "samples": 100,
        "mean_magnitude": 0.5,
        "dormant": 2,
        "dead": 1,
        "rank_samples": 50,
        "effective_rank": 3.5,
        "stable_rank": 1.5,
    }
    return UnitActivity(**made | fields)


def run(names: list[str], steps: int = 3, **fields: Any) -> list[StepRecord]:
    return [StepRecord(step, {name: layer_record(**fields) for name in names}) for step in range(steps)]


# numbers


@pytest.mark.parametrize("rule", ["gradient", "update"])
def test_each_number_equals_its_definition(mlp: nn.Module, vectors: Tensor, rule: str) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    optimizer = sgd(bio) if rule == "gradient" else torch.optim.AdamW(bio.parameters(), lr=0.01)
    monitor = Monitor()
    drawn = {path: factors(bio, path).double().numpy() for path in weights(bio)}
    handle = biofx.attach(bio, optimizer, ["crystallize"], observers=[monitor])
    assert set(handle.modes.values()) == {rule}
    train(bio, optimizer, vectors, 3)
    backward(bio, vectors)
    norms = {
        n: math.sqrt(float((p.grad.double() ** 2).sum()))
        for n, p in bio.named_parameters()
        if p.grad is not None
    }
    before = weights(bio)
    optimizer.step()
    assert [record.step for record in monitor.records] == [0, 1, 2, 3]
    layers = monitor.records[-1].layers
    assert list(layers) == ["0.weight", "2.weight", "4.weight"]
    for path, after in weights(bio).items():
        layer, rates = layers[path], factors(bio, path).double().numpy()
        assert layer.synapses == after.numel()
        assert layer.factor_mean == pytest.approx(rates.mean(), rel=1e-5)
        assert layer.factor_std == pytest.approx(rates.std(ddof=1), rel=1e-5)
        edges = [*HISTOGRAM_EDGES[:-1], math.inf]
        assert layer.factor_histogram == tuple(numpy.histogram(rates, edges)[0])
        crystallized = (rates < numpy.float32(0.9)) & (drawn[path] >= numpy.float32(0.9))
        assert layer.crystallized == crystallized.sum()
        assert layer.crystallized_fraction == crystallized.mean()
        assert layer.gradient_norm == pytest.approx(norms[path], rel=1e-5)
        entries = after.flatten().tolist()
        excitation, inhibition = sum(w for w in entries if w > 0), -sum(w for w in entries if w < 0)
        assert layer.excitation == pytest.approx(excitation, rel=1e-5)
        assert layer.inhibition == pytest.approx(inhibition, rel=1e-5)
        assert layer.ei_ratio == pytest.approx(excitation / inhibition, rel=1e-5)
        assert layer.wrong_signs == layer.wrong_signs_raw == 0
        assert layer.touched["crystallize"] >= 0
        # signs are enforced after the step: only what they changed may differ
        changed = (after - before[path]).norm().item()
        assert layer.update_norm is not None
        assert layer.update_norm >= changed * (1 - 1e-5)
        if layer.touched["enforce_dales_principle"] == 0:
            assert layer.update_norm == pytest.approx(changed, rel=1e-5)
    assert sum(layer.touched["crystallize"] for r in monitor.records for layer in r.layers.values()) > 0


def test_update_norm_is_of_the_step_alone(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE))
    monitor, optimizer = Monitor(), sgd(bio, 0.2)
    biofx.attach(bio, optimizer, ["rejuvenate_weights"], observers=[monitor])
    train(bio, optimizer, vectors, 1)
    for layer in monitor.records[0].layers.values():
        assert layer.gradient_norm is not None
        assert layer.update_norm == pytest.approx(0.2 * layer.gradient_norm, rel=1e-5)
        assert layer.factor_mean is layer.factor_std is layer.crystallized is None
        assert layer.factor_histogram == ()
        assert layer.crystallized_fraction is None
        assert layer.wrong_signs is layer.wrong_signs_raw is None


def test_replaced_synapses_are_those_that_change_while_nothing_learns(
    mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = biofx.transform(mlp, BioConfig())
    monitor, optimizer = Monitor(every=2), sgd(bio, 0.0)
    biofx.attach(bio, optimizer, [Rule("rejuvenate_weights", every=2, after=1)], observers=[monitor])
    changed: list[dict[str, int]] = []
    for _ in range(5):
        before = weights(bio)
        train(bio, optimizer, vectors, 1)
        changed.append({path: int((after != before[path]).sum()) for path, after in weights(bio).items()})
    assert [record.step for record in monitor.records] == [0, 2, 4]
    assert all(count == 0 for step in (0, 2, 4) for count in changed[step].values())
    assert sum(changed[1].values()) > 0
    for path in weights(bio):  # what happened between two records is in the second
        found = [record.layers[path].replaced for record in monitor.records]
        assert found == [0, changed[1][path], changed[3][path]]


def test_effective_signs_hold_where_raw_ones_do_not(mlp: nn.Module) -> None:
    for method in ("project", "abs"):
        signed = ConstrainSigns(
            method=method, initialisation="keep", constrain_inputs=True, constrain_readout=True
        )
        bio = signed(biofx.capture(mlp)).graph_module
        layer = Monitor().record(bio)
        assert layer is not None
        for path, raw in weights(bio).items():
            signs = state_of(bio, path).presynaptic_signs().float()
            wrong = int((raw * signs < 0).sum())
            used = raw.abs() * signs if method == "abs" else torch.where(raw * signs < 0, 0, raw)
            assert wrong > 0
            assert layer.layers[path].wrong_signs_raw == wrong
            assert layer.layers[path].wrong_signs == 0
            assert layer.layers[path].excitation == pytest.approx(used[used > 0].sum().item(), rel=1e-5)
            assert layer.layers[path].inhibition == pytest.approx(-used[used < 0].sum().item(), rel=1e-5)


def test_sign_that_the_graph_does_not_enforce_is_a_fault(mlp: nn.Module) -> None:
    bio = biofx.BioConverter()(mlp)
    state_of(bio, "0.weight").sign = torch.ones(6, dtype=torch.int8)
    state_of(bio, "2.weight").reads_signs_of([(state_of(bio, "0.weight"), "sign")], {})
    record = Monitor().record(bio)
    assert record is not None
    negative = int((weights(bio)["2.weight"] < 0).sum())
    assert record.layers["2.weight"].wrong_signs == record.layers["2.weight"].wrong_signs_raw == negative > 0


def test_histogram_takes_what_lies_beyond_its_edges(mlp: nn.Module) -> None:
    bio = biofx.BioConverter()(mlp)
    state = bio.get_submodule("4").bio_mod
    state.fuzzy_learning_rate_parameters = torch.tensor([[0.0, 0.125, 0.1249, 1.0], [2.0, 1.875, 70.0, 0.99]])
    record = Monitor(crystallized_below=0.5).record(bio)
    assert record is not None
    assert record.layers["4.weight"].factor_histogram == (2, 1, *(0,) * 5, 1, 1, *(0,) * 6, 3)
    assert record.layers["4.weight"].crystallized == 0  # nothing has crystallized


def test_shared_factors_count_once(mlp: nn.Module) -> None:
    bio = biofx.BioConverter(fuzzy_lr_granularity="layer")(mlp)
    record = Monitor().record(bio)
    assert record is not None
    layer = record.layers["0.weight"]
    assert (layer.synapses, sum(layer.factor_histogram), layer.factor_std) == (24, 1, 0.0)


def test_ratio_without_inhibition() -> None:
    assert layer_record(inhibition=0.0).ei_ratio == math.inf
    assert math.isnan(layer_record(excitation=0.0, inhibition=0.0).ei_ratio)


def test_half_precision_is_summed_in_single(mlp: nn.Module) -> None:
    with torch.random.fork_rng():
        wide = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 2)).half()
    bio = biofx.BioConverter()(wide)
    bio.get_submodule("0").weight.data.fill_(1.0)
    record = Monitor().record(bio)
    assert record is not None
    assert record.layers["0.weight"].excitation == 300 * 300  # beyond the largest half


# explicit loops


def test_guides_hand_computation_gives_the_same(mlp: nn.Module, vectors: Tensor) -> None:
    bio = biofx.BioConverter(crystal_thresh=0.05, rejuvenation_turnover=0.2)(mlp)
    optimizer, monitor = sgd(bio), Monitor()
    crystallized, variability, rejuvenated, updates, gradients = [], [], [], [], []
    drawn_low = int((factors(bio, "0.weight") < 0.9).sum())
    for epoch in range(12):
        backward(bio, vectors)
        before = weights(bio)["0.weight"]
        bio.crystallize()
        rates = factors(bio, "0.weight")
        crystallized.append(torch.sum(rates < 0.9).item())
        variability.append(rates.std().item())
        bio.fuzzy_learning_rates()
        gradients.append(bio.get_submodule("0").weight.grad.norm().item())
        optimizer.step()
        replaced = None
        if epoch % 5 == 0:
            pre_rejuvenation = weights(bio)["0.weight"]
            replaced = bio.rejuvenate_weights()
            rejuvenated.append(int(((weights(bio)["0.weight"] - pre_rejuvenation).abs() > 1e-6).sum()))
        monitor.record(bio, replaced=replaced)
        updates.append((weights(bio)["0.weight"] - before).norm().item())
    layers = [record.layers["0.weight"] for record in monitor.records]
    assert [record.step for record in monitor.records] == list(range(12))
    assert [layer.crystallized for layer in layers] == [count - drawn_low for count in crystallized]
    assert crystallized[-1] > crystallized[0] > drawn_low > 0
    assert [layer.factor_std for layer in layers] == variability
    assert [layer.replaced for layer in layers[::5]] == rejuvenated
    assert sum(layer.replaced for layer in layers) == sum(rejuvenated) > 0
    assert [layer.gradient_norm for layer in layers] == gradients
    assert layers[0].update_norm is None
    assert [layer.update_norm for layer in layers[1:]] == updates[1:]


def test_update_is_of_one_step_however_seldom_it_is_recorded(mlp: nn.Module, vectors: Tensor) -> None:
    bio = biofx.BioConverter()(mlp)
    optimizer, monitor = sgd(bio), Monitor(every=3)
    for step in range(7):
        backward(bio, vectors)
        before = weights(bio)["2.weight"]
        optimizer.step()
        record = monitor.record(bio, step)
        assert (record is not None) == (step in (0, 3, 6))
        if record is not None and step:
            expected = (weights(bio)["2.weight"] - before).norm().item()
            assert record.layers["2.weight"].update_norm == expected


def test_record_without_gradients_and_with_reasons(mlp: nn.Module) -> None:
    bio = biofx.BioConverter()(mlp)
    record = Monitor().record(bio, replaced={"0.weight": 3, "2.weight": "its weight is frozen"})
    assert record is not None
    assert [layer.replaced for layer in record.layers.values()] == [3, 0, 0]
    assert all(layer.gradient_norm is None for layer in record.layers.values())


def test_record_refuses_what_it_cannot_place(mlp: nn.Module) -> None:
    with pytest.raises(PlasticityError, match=r"use biofx\.transform or biofx\.BioConverter first"):
        Monitor().record(mlp)
    bio = biofx.BioConverter()(mlp)
    with pytest.raises(OptionError, match=r"expected paths of weights .* found '0'"):
        Monitor().record(bio, replaced={"0": 3})
    with pytest.raises(OptionError, match="step: expected a whole number"):
        Monitor().record(bio, -1)


# with training


@pytest.mark.parametrize("method", [torch.optim.SGD, torch.optim.AdamW])
def test_training_is_the_same_to_the_bit(
    mlp: nn.Module, vectors: Tensor, tmp_path: Path, method: type[torch.optim.Optimizer]
) -> None:
    found: list[dict[str, Any]] = []
    random_state = torch.get_rng_state()
    for observers in ([], [Monitor(path=tmp_path / "run.jsonl")], [Monitor(every=3)]):
        config = DALE.replace(fuzzy_lr_distribution="temporal", fuzzy_lr_dynamic=True, fuzzy_lr_update_freq=2)
        bio, _ = biofx.transform(mlp, config)
        optimizer = method(bio.parameters(), lr=0.05)  # type: ignore[call-arg]
        schedule: list[Rule | str] = [
            "crystallize",
            Rule("rejuvenate_weights", every=4),
            "volume_dependent_lr",
        ]
        biofx.attach(bio, optimizer, schedule, observers=observers)
        train(bio, optimizer, vectors, 10)
        found.append(bio.state_dict())
    for other in found[1:]:
        assert list(other) == list(found[0])
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_recording_leaves_the_model_as_it_is(mlp: nn.Module, vectors: Tensor, unchanged: Any) -> None:
    bio = biofx.BioConverter(apply_dales_principle=True)(mlp)
    backward(bio, vectors)
    gradients = [parameter.grad.clone() for parameter in bio.parameters() if parameter.grad is not None]
    with unchanged(bio):
        Monitor().record(bio)
    assert all(
        torch.equal(p.grad, g) for p, g in zip(bio.parameters(), gradients, strict=True) if p.grad is not None
    )


def test_norms_are_computed_only_for_recorded_steps(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp)
    optimizer, monitor, seen = sgd(bio), Monitor(every=2), []

    class Spy:
        def is_due(self, step: int) -> bool:
            return False

        def __call__(self, step: int, layers: Mapping[str, LayerStep]) -> None:
            seen.append([math.isnan(n) for s in layers.values() for n in (s.gradient_norm, s.update_norm)])

    biofx.attach(bio, optimizer, observers=[monitor, Spy()])
    train(bio, optimizer, vectors, 3)
    assert [all(step) for step in seen] == [any(step) for step in seen] == [False, True, False]
    assert len(monitor.records) == 2


def test_wrapped_model_and_parametrized_layer(mlp: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(mlp.get_submodule("2"))
    bio = biofx.BioConverter()(mlp)
    record = Monitor().record(nn.DataParallel(bio))
    assert record is not None
    assert list(record.layers) == ["0.weight", "4.weight"]


def test_two_optimizers_on_one_model(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp)
    monitor = Monitor()
    first = torch.optim.SGD(bio.get_submodule("0").parameters(), lr=0.1)
    rest = torch.optim.SGD(
        [*bio.get_submodule("2").parameters(), *bio.get_submodule("4").parameters()], lr=0.1
    )
    for optimizer in (first, rest):
        biofx.attach(bio, optimizer, observers=[monitor])
    for _ in range(2):
        backward(bio, vectors)
        first.step()
        rest.step()
    steps = [(record.step, list(record.layers)) for record in monitor.records]
    assert steps == [
        (0, ["0.weight"]),
        (0, ["2.weight", "4.weight"]),
        (1, ["0.weight"]),
        (1, ["2.weight", "4.weight"]),
    ]
    assert [len(points) for points in series_of(monitor.records).values()] == [2, 2, 2]


def test_only_the_latest_records_are_kept(mlp: nn.Module) -> None:
    bio, monitor = biofx.BioConverter()(mlp), Monitor(keep=2)
    for _ in range(5):
        monitor.record(bio)
    assert [record.step for record in monitor.records] == [3, 4]


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"keep": 0}, {"crystallized_below": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Monitor(**options)


# lines of JSON


def test_file_has_each_record_at_once_and_gives_it_back(
    mlp: nn.Module, vectors: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    bio, _ = biofx.transform(mlp, DALE)
    optimizer, monitor = sgd(bio), Monitor(path=path, every=2, crystallized_below=0.8)
    biofx.attach(bio, optimizer, ["crystallize"], observers=[monitor])
    for step in range(4):
        train(bio, optimizer, vectors, 1)
        assert len(path.read_text(encoding="utf-8").splitlines()) == 2 + step // 2
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {
        "schema": "biofx.run/2",
        "crystallized_below": 0.8,
        "dormancy": 0.1,
        "histogram_edges": [place / 8 for place in range(17)],
    }
    assert [line["step"] for line in lines[1:]] == [0, 2]
    assert set(lines[1]["layers"]["0.weight"]) == {field.name for field in dataclasses.fields(LayerRecord)}
    found = Monitor.read(path)
    assert found.records == monitor.records
    assert found.crystallized_below == 0.8


def test_numbers_that_json_lacks_survive(tmp_path: Path) -> None:
    monitor = Monitor(path=tmp_path / "run.jsonl")
    odd = layer_record(excitation=math.nan, gradient_norm=math.inf, update_norm=-math.inf, factor_mean=None)
    monitor._add_record(0, {"schicht ü.weight": odd})
    text = (tmp_path / "run.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert repr(Monitor.read(tmp_path / "run.jsonl").records) == repr(monitor.records)


def written(path: Path, steps: int = 3) -> list[StepRecord]:
    monitor = Monitor(path=path)
    for record in run(["a.weight"], steps):
        monitor._add_record(record.step, dict(record.layers))
    return monitor.records


def test_half_a_last_line_is_left_out_and_cut_off_on_going_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    records = written(path)
    content = path.read_bytes()
    first_lines = content.index(b'{"step":0')
    for end in range(first_lines, len(content)):
        path.write_bytes(content[:end])
        whole = content[:end].count(b"\n") - 1
        assert Monitor.read(path).records == records[:whole]
    Monitor(path=path, append=True)._add_record(7, {"a.weight": layer_record()})
    assert [record.step for record in Monitor.read(path).records] == [0, 1, 7]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3: expected JSON"),
        (b"\xff\xfe", "line 3: expected JSON"),
        (b"[1]", "line 3: expected a recorded step"),
        (b'{"step": 1}', "line 3: expected a recorded step: no 'layers'"),
        (b'{"step": -1, "layers": {}}', "line 3: .* found -1 where a count belongs"),
        (b'{"step": true, "layers": {}}', "line 3: .* found True where a count belongs"),
        (b'{"step": 1, "layers": {"a": {"excitation": "much"}}}', "found 'much' where a number belongs"),
    ],
)
def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "run.jsonl"
    written(path)
    lines = path.read_bytes().split(b"\n")
    lines[2] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(OptionError, match=message):
        Monitor.read(path)


@pytest.mark.parametrize("content", [b"", b"step,loss\n", b"[]\n", b'{"schema":"biofx.run/3"}\n', b"{}\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=r"biofx\.run/2|expected JSON"):
        Monitor.read(path)


def test_header_without_a_threshold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"schema":"biofx.run/1"}\n', encoding="utf-8")
    with pytest.raises(OptionError, match="line 1: expected a number as crystallized_below, found None"):
        Monitor.read(path)


def test_keys_of_later_minor_additions_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    records = written(path)
    path.write_text(path.read_text(encoding="utf-8").replace('"step":', '"more":1,"step":'), encoding="utf-8")
    assert Monitor.read(path).records == records


def test_missing_file_and_unusable_place_are_errors(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot read"):
        Monitor.read(tmp_path / "nothing.jsonl")
    with pytest.raises(OptionError, match="cannot read"):
        Monitor(path=tmp_path)
    monitor = Monitor(path=tmp_path / "no folder" / "run.jsonl")
    with pytest.raises(OptionError, match="cannot write"):
        monitor._add_record(0, {})


def test_file_of_an_earlier_run_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    records = written(path)
    with pytest.raises(OptionError, match=r"expected a new or empty file.*append=True"):
        Monitor(path=path)
    with pytest.raises(OptionError, match=r"crystallized_below=0\.5, found 0\.9"):
        Monitor(path=path, append=True, crystallized_below=0.5)
    assert Monitor.read(path).records == records
    Monitor(path=path, append=True)._add_record(3, {"a.weight": layer_record()})
    assert Monitor.read(path).records == run(["a.weight"], 4)


def test_first_rank_alone_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monitor = Monitor(path=tmp_path / "run.jsonl")
        monitor._add_record(0, {"a.weight": layer_record()})
        assert len(monitor.records) == 1
        assert (tmp_path / "run.jsonl").exists() == (rank == 0)


# TensorBoard


class FakeWriter:
    made: list[FakeWriter]

    def __init__(self, log_dir: str) -> None:
        self.log_dir, self.flushes = log_dir, 0
        self.scalars: dict[tuple[str, int], float] = {}
        self.histograms: dict[str, dict[str, Any]] = {}
        type(self).made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def add_histogram_raw(self, tag: str, **fields: Any) -> None:
        self.histograms[tag] = fields

    def flush(self) -> None:
        self.flushes += 1


def test_tensorboard_gets_curves_and_histograms(
    mlp: nn.Module, vectors: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeWriter.made = []
    fake: Any = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    bio, _ = biofx.transform(mlp, DALE)
    optimizer, monitor = sgd(bio), Monitor(tensorboard=tmp_path / "logs")
    biofx.attach(bio, optimizer, ["crystallize"], observers=[monitor])
    train(bio, optimizer, vectors, 2)
    monitor.close()
    (writer,) = FakeWriter.made
    assert (writer.log_dir, writer.flushes) == (str(tmp_path / "logs"), 1)
    layer = monitor.records[1].layers["2.weight"]
    activity = layer.activity
    assert activity is not None
    assert {
        tag.split("/")[0]: value
        for (tag, step), value in writer.scalars.items()
        if (step, tag[-8:]) == (1, "2.weight")
    } == {
        "factor mean": layer.factor_mean,
        "factor std": layer.factor_std,
        "crystallized fraction": layer.crystallized_fraction,
        "replaced synapses": 0,
        "wrong signs": 0,
        "E-I ratio": layer.ei_ratio,
        "gradient norm": layer.gradient_norm,
        "update norm": layer.update_norm,
        "weight magnitude": layer.weight_magnitude,
        "dormant fraction": activity.dormant_fraction,
        "dead fraction": activity.dead_fraction,
        "effective rank": activity.effective_rank,
        "stable rank": activity.stable_rank,
    }
    histogram, rates = writer.histograms["factors/2.weight"], factors(bio, "2.weight").double()
    assert histogram["num"] == rates.numel() == sum(histogram["bucket_counts"])
    assert histogram["sum"] == pytest.approx(rates.sum().item(), rel=1e-5)
    assert histogram["sum_squares"] == pytest.approx((rates**2).sum().item(), rel=1e-5)
    assert histogram["bucket_limits"] == list(HISTOGRAM_EDGES[1:])
    assert histogram["global_step"] == 1
    monitor._add_record(
        9, {"bare.weight": layer_record(factor_mean=None, factor_std=None, crystallized=None, inhibition=0.0)}
    )
    tags = {tag for tag, step in writer.scalars if step == 9}
    always = ("replaced synapses", "gradient norm", "update norm", "weight magnitude")
    assert tags == {f"{name}/bare.weight" for name in always}
    assert "factors/bare.weight" not in writer.histograms


def test_missing_tensorboard_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        Monitor(tensorboard="logs")


def test_a_writer_of_ones_own_and_loggers_get_the_same_numbers(mlp: nn.Module, vectors: Tensor) -> None:
    FakeWriter.made = []
    writer: Any = FakeWriter("")
    taken: list[tuple[int, dict[str, float]]] = []

    def log(values: dict[str, float], step: int) -> None:
        taken.append((step, values))

    bio, _ = biofx.transform(mlp, DALE)
    optimizer, monitor = sgd(bio), Monitor(tensorboard=writer, log=log, every=2)
    monitor.log_to(log)
    biofx.attach(bio, optimizer, observers=[monitor])
    train(bio, optimizer, vectors, 3)
    assert [step for step, _ in taken] == [0, 2]
    assert {(name, step): value for step, values in taken for name, value in values.items()} == writer.scalars
    assert taken[1][1]["factor mean/2.weight"] == monitor.records[1].layers["2.weight"].factor_mean
    assert taken[1][1] == biofx.diagnostics.curves(monitor.records[1])
    with pytest.raises(InputError, match=r"log: expected what is called as log\(values, step=step\)"):
        Monitor(log="wandb")  # type: ignore[arg-type]


# the picture


def plotted(records: list[StepRecord], path: Path | None = None) -> Any:
    monitor = Monitor()
    monitor.records = records
    return monitor.plot(path)


def test_curves_are_the_records(tmp_path: Path) -> None:
    names = ["a.weight", "b.weight"]
    records = [
        StepRecord(
            step,
            {
                name: layer_record(
                    factor_mean=1 - 0.01 * step * place,
                    crystallized=step,
                    touched={"rejuvenate_weights": step + place},
                    gradient_norm=None if step == 1 else 0.1 * (step + 1),
                    update_norm=0.2 * (step + 1),
                )
                for place, name in enumerate(names)
            },
        )
        for step in range(3)
    ]
    figure = plotted(records, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    panels = figure.axes
    curves = [[list(zip(*line.get_data(), strict=True)) for line in panel.lines[:2]] for panel in panels]
    assert curves[0] == [[(0, 1), (1, 1), (2, 1)], [(0, 1), (1, 0.99), (2, 0.98)]]
    assert curves[1] == [[(0, 0), (1, 12.5), (2, 25)]] * 2
    assert curves[2] == [[(0, 0), (1, 1), (2, 3)], [(0, 1), (1, 3), (2, 6)]]
    assert curves[3] == [[(0, 1.5), (1, 1.5), (2, 1.5)]] * 2
    assert curves[4] == [[(0, 0.1), (2, 0.1 * 3)]] * 2
    assert curves[5] == [[(0, 0.2), (1, 0.4), (2, 0.2 * 3)]] * 2
    assert [panel.get_ylabel() for panel in panels] == [
        "learning-rate factor (mean ± std)",
        "crystallized below 0.9 (% of factors)",
        "replaced synapses (cumulative count)",
        "E:I ratio (Σ excitatory / Σ |inhibitory|)",
        "gradient norm (L2, loss / weight)",
        "update norm (L2, weight)",
    ]
    assert [panel.get_yscale() for panel in panels] == ["linear"] * 4 + ["log"] * 2
    assert {panel.get_xlabel() for panel in panels[3:]} == {"optimizer step"}
    assert len(panels[0].collections) == 2  # one band per layer


def test_labels_of_panels_do_not_overlap_and_utilities_are_on_a_log_scale(tmp_path: Path) -> None:
    seen = UnitActivity(
        units=8,
        samples=4,
        mean_magnitude=1.0,
        dormant=6,
        dead=2,
        rank_samples=4,
        effective_rank=2.0,
        stable_rank=1.0,
    )
    figure = plotted(
        run(["a.weight"], activity=seen, unit_age=3.0, unit_utility=0.5, utility=1e-3), tmp_path / "run.png"
    )
    panels = figure.axes
    utilities = panels[11]
    assert utilities.get_ylabel() == "mean utility of units\ndashed: of synapses"
    assert utilities.get_yscale() == "log"
    assert 0 < utilities.get_ylim()[0] < 1e-3
    assert panels[6].get_ylim()[0] == 0
    for column in range(3):
        labels = [panel.yaxis.label.get_window_extent() for panel in panels[column:12:3]]
        assert all(above.y0 > below.y1 for above, below in itertools.pairwise(labels))


def test_few_layers_get_a_legend_and_many_a_scale() -> None:
    few = plotted(run(["_hidden.weight", "cost$x$y.weight", "c.weight"]))
    assert [text.get_text() for text in few.legends[0].get_texts()] == ["_hidden", r"cost\$x\$y", "c"]
    many = plotted(run([f"blocks.{place}.fc.weight" for place in range(60)]))
    assert not many.legends
    named = [text.get_text() for text in many.axes[-1].get_yticklabels()]
    assert len(named) == 26
    assert (named[0], named[-1]) == ("blocks.0.fc", "blocks.59.fc")


def test_what_was_never_recorded_is_said(tmp_path: Path) -> None:
    bare = layer_record(
        factor_mean=None, factor_std=None, crystallized=None, gradient_norm=0.0, inhibition=0.0
    )
    figure = plotted([StepRecord(0, {"a.weight": bare})], tmp_path / "run.pdf")
    said = [[text.get_text() for text in panel.texts] for panel in figure.axes]
    assert said == [["nothing recorded"], ["nothing recorded"], [], ["nothing recorded"], [], []]
    assert [panel.get_yscale() for panel in figure.axes[4:]] == ["linear", "log"]


def test_run_that_went_back_to_a_checkpoint_counts_steps_once() -> None:
    records = [*run(["a.weight"], 5), *run(["a.weight"], 4, crystallized=7)[2:]]
    points = series_of(records)["a.weight"]
    assert [(step, layer.crystallized) for step, layer in points] == [(0, 2), (1, 2), (2, 7), (3, 7)]


def test_plot_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="found no records"):
        Monitor().plot()
    for place in (tmp_path / "no folder" / "run.png", tmp_path / "run.xyz"):
        with pytest.raises(OptionError, match="cannot write the picture"):
            plotted(run(["a.weight"]), place)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'biofx\[demo\]'"):
        plotted(run(["a.weight"]))


# the table


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=True,
        force_interactive=True,
        color_system=None,
    )


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(console: Console, records: list[StepRecord]) -> list[str]:
    """The lines of the table as it stands after the last record."""
    monitor = Monitor()
    with monitor.live(console):
        for record in records:
            monitor._add_record(record.step, dict(record.layers))
    output = printed(console)
    return [line.rstrip() for line in output[output.rindex("step ") :].replace("\x1b[?25h", "").splitlines()]


def test_table_shows_the_latest_record_in_80_columns() -> None:
    layers = {
        "stem.weight": layer_record(wrong_signs=3, touched={"rejuvenate_weights": 1000}),
        "layer[red]x.weight": layer_record(
            factor_mean=None, factor_std=None, crystallized=None, inhibition=0.0
        ),
        "model.encoder.layers.11.attention.self.query.weight": layer_record(
            touched={"rejuvenate_weights": 2_000_000}, gradient_norm=None, inhibition=0.001
        ),
    }
    lines = shown(terminal(), [StepRecord(9, layers), StepRecord(1234, layers)])
    assert lines == [
        "step 1,234",
        "layer               factors  crystal.  replaced  wrong    E:I  gradient   update",
        "stem              1.00±0.10     25.0%     2,000      3   1.50   5.0e-01  2.5e-01",
        "layer[red]x               –         –         0      –    inf   5.0e-01  2.5e-01",
        "….l.11.a.s.query  1.00±0.10     25.0%      4.0M      –  3e+03         –  2.5e-01",
    ]


def test_many_layers_are_cut_to_the_height() -> None:
    names = [f"blocks.{place}.weight" for place in range(50)]
    lines = shown(terminal(height=14), run(names))
    assert [line.split("  ")[0] for line in lines[2:]] == [
        *(f"blocks.{place}" for place in range(5)),
        "… 41 more",
        *(f"blocks.{place}" for place in range(46, 50)),
    ]
    assert max(map(len, lines)) <= 80


def test_table_follows_the_training_and_goes_away(mlp: nn.Module) -> None:
    console, bio, monitor = terminal(), biofx.BioConverter()(mlp), Monitor()

    def interrupted_training() -> None:
        with monitor.live(console):
            assert "no step recorded yet" in printed(console)
            monitor.record(bio)
            assert "step 0" in printed(console)
            monitor.close()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_training()
    before = printed(console)
    monitor.record(bio)
    assert printed(console) == before


def test_second_table_begins_with_what_was_recorded(mlp: nn.Module) -> None:
    monitor, console = Monitor(), terminal()
    monitor.records = run(["a.weight"], touched={"rejuvenate_weights": 5})
    with monitor.live(console):
        pass
    assert "15" in printed(console)


def test_nothing_is_shown_where_there_is_no_terminal(
    mlp: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = Monitor()
    with monitor.live():
        monitor.record(biofx.BioConverter()(mlp))
    assert capsys.readouterr() == ("", "")


def test_long_names_stay_distinct() -> None:
    names = [f"encoder.layers.{place}.attention.output.dense.weight" for place in range(12)]
    short = [short_name(name, 16) for name in names]
    assert len(set(short)) == 12
    assert max(map(len, short)) <= 16
    assert short_name("a_very_long_name.weight", 8) == "…ng_name"


def test_table_is_a_sink(mlp: nn.Module) -> None:
    from biofx.diagnostics.monitor_table import LiveTable

    table = LiveTable([], terminal())
    sink: Sink = table
    assert table.table().title == "no step recorded yet"
    sink.write(run(["a.weight"])[0])
    assert table.table().title == "step 0"


def test_factors_that_were_written_to_are_measured_again(mlp: nn.Module) -> None:
    bio = biofx.transform(mlp).graph_module
    monitor, state, means = Monitor(), state_of(bio, "0.weight"), list[Any]()
    for change in (lambda held: held, lambda held: held, lambda held: held.mul_(0.5), torch.ones_like):
        state.fuzzy_learning_rate_parameters = change(factors(bio, "0.weight"))
        record = monitor.record(bio)
        assert record is not None
        means.append(record.layers["0.weight"].factor_mean)
        assert means[-1] == factors(bio, "0.weight").mean().item()
    assert means[0] == means[1]
    assert means[2:] == [pytest.approx(means[0] / 2), 1.0]
