"""The experiments on learning that goes on: streams by definition, paired arms, and each from end to end."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biofx.plasticity.attachment import Attachment
from biofx.plasticity.initial_weights import initial_weights
from reproduce import command
from reproduce.command import execute
from reproduce.data import NONE, digits
from reproduce.experiment import Experiment, Job
from reproduce.experiments import online_permuted_images as permuted
from reproduce.experiments import permuted_tasks_consolidation as consolidation
from reproduce.experiments import slowly_changing_regression as regression
from reproduce.streams import dead_units, learner_of, part_mean

MODULES: dict[str, Any] = {module.EXPERIMENT.name: module for module in (regression, permuted, consolidation)}
LEARNING_ON: list[Experiment] = [module.EXPERIMENT for module in MODULES.values()]
TINY = {
    "slowly-changing-regression": ["steps=60"],
    "online-permuted-images": ["tasks=2", "images=90"],
    "permuted-tasks-consolidation": ["tasks=3", "images=300", "epochs=1", "units=16"],
}


def job_of(experiment: Experiment, arm: str, *, rate: float = 0.01) -> Job:
    lengths = dict(entry.split("=") for entry in TINY[experiment.name])
    return Job(
        experiment=experiment.name,
        dataset="digits" if experiment.needs_images else NONE,
        case=next(iter(experiment.cases)),
        arm=arm,
        rate=rate,
        seed=0,
        lengths=tuple((name, int(number)) for name, number in lengths.items()),
    )


# streams


def test_the_target_is_a_network_of_threshold_units() -> None:
    target = regression.Target(torch.Generator().manual_seed(1))
    bits = torch.randint(2, (100, 20), generator=torch.Generator().manual_seed(2)).float()
    weight, bias, readout = target.weight.tolist(), target.bias.tolist(), target.readout.tolist()
    assert (
        {abs(value) for row in weight for value in row} == {1.0} == {abs(value) for value in bias + readout}
    )
    expected, active = [], 0
    for row in bits.tolist():
        value = float(target.offset)
        for unit in range(100):
            reached = sum(w * x for w, x in zip(weight[unit], row, strict=True)) + bias[unit]
            negative = sum(w == -1 for w in weight[unit])
            # S of the authors: half of (inputs - sum of weights + bias); the first half counts weights of -1
            if reached > 0.7 * 21 - (negative + bias[unit] / 2):
                value += readout[unit]
                active += 1
        expected.append([value])
    assert 100 < active < 2000
    torch.testing.assert_close(target(bits), torch.tensor(expected), rtol=0, atol=0)


def test_one_slow_bit_flips_between_blocks_and_the_others_are_drawn_at_each_step() -> None:
    stream = regression.Stream(3)
    blocks = [stream.block() for _ in range(4)]
    for inputs, values in blocks:
        assert inputs.shape == (10_000, 20)
        assert torch.equal(inputs[:, :15], inputs[:1, :15].expand(10_000, 15))
        torch.testing.assert_close(inputs[:, 15:].mean(0), torch.full((5,), 0.5), atol=0.03, rtol=0)
        assert torch.equal(values, stream.target(inputs))
    for (before, _), (after, _) in itertools.pairwise(blocks):
        assert int((before[0, :15] != after[0, :15]).sum()) == 1
    assert torch.equal(regression.Stream(3).block()[0], blocks[0][0])
    assert not torch.equal(regression.Stream(4).block()[0], blocks[0][0])


def test_a_task_is_a_permutation_of_the_pixels_of_images_each_seen_once() -> None:
    part = digits(0).train
    pixels, labels = part[0].flatten(1), part[1]
    places: list[Tensor] = []
    for task in itertools.islice(permuted.tasks(part, 5, 200), 3):
        batches = list(task.batches(30))
        assert [len(labels) for _, labels in batches] == [30] * 6 + [20]
        images, expected = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(task.last(50), images[150:])
        assert images.shape == (200, 64)
        # sorted pixels name an image whatever the permutation
        known = {tuple(sorted(row)): int(label) for row, label in zip(pixels.tolist(), labels, strict=True)}
        names = [tuple(sorted(row)) for row in images.tolist()]
        assert [known[name] for name in names] == expected.tolist()
        assert len(set(names)) > 190
        places.append(images.mean(0))
    assert not torch.allclose(places[0], places[1], atol=0.1)
    whole = next(permuted.tasks(part, 5, 10_000))
    assert sorted(whole.order.tolist()) == list(range(len(labels)))


def test_each_task_is_learned_and_read_under_its_own_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = consolidation.permutations(0, 3, 64)
    assert [sorted(order.tolist()) for order in orders] == [list(range(64))] * 3
    assert len({tuple(order.tolist()) for order in orders}) == 3
    read: list[tuple[Tensor, Tensor]] = []
    data = digits(0)

    def noting(permuted: consolidation.Permuted, part: Any) -> float:
        read.append((permuted.order, part[0]))
        images = part[0][:5]
        expected = permuted.model(images.flatten(1)[:, permuted.order])
        assert torch.equal(permuted(images), expected)
        return float(len(read))

    monkeypatch.setattr(consolidation, "accuracy", noting)
    begun: list[Any] = []
    begin = Attachment.begin_task

    def beginning(attachment: Attachment, batches: Any = None) -> None:
        begun.append(batches)
        begin(attachment, batches)

    monkeypatch.setattr(Attachment, "begin_task", beginning)
    found = execute(
        consolidation.EXPERIMENT, job_of(consolidation.EXPERIMENT, "elastic consolidation, 100"), digits
    )
    tasks = [0, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    for (order, images), task, part in zip(read, tasks, [data.test] * 9 + [data.validation] * 3, strict=True):
        assert torch.equal(order, orders[task])
        assert torch.equal(images, part[0])
    assert found.found.curves["known"] == [1, 2.5, 5]
    assert found.found.figures["mean"] == 8
    assert (found.found.figures["first"], found.found.figures["last"]) == (7, 9)
    assert begun[0] is None
    for batches, order in zip(begun[1:], orders, strict=False):
        assert torch.equal(batches[0], data.train[0].flatten(1)[:300][:, order])
    assert len(begun) == 3


# pairs


@pytest.mark.parametrize("experiment", LEARNING_ON, ids=lambda experiment: experiment.name)
def test_arms_have_equal_initial_weights_and_equal_data(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {}
    weights: dict[str, list[Tensor]] = {}

    def noting(arm: Any, *rest: Any) -> Any:
        model, optimizer, attachment = learner_of(arm, *rest)
        name = next(key for key, value in experiment.arms.items() if value is arm)
        linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        weights[name] = [p.detach().clone() for layer in linear for p in (layer.weight, layer.bias)]

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                seen.setdefault(name, []).append(inputs[0].clone())

        model.register_forward_pre_hook(note)
        return model, optimizer, attachment

    monkeypatch.setattr(MODULES[experiment.name], "learner_of", noting)
    state = torch.get_rng_state()
    for arm in experiment.arms:
        execute(experiment, job_of(experiment, arm), digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(seen) == set(experiment.arms)
    for arm in experiment.arms:
        for own, other in zip(weights[arm], weights["plain"], strict=True):
            assert torch.equal(own, other)
        assert len(seen[arm]) == len(seen["plain"])
        assert all(torch.equal(own, other) for own, other in zip(seen[arm], seen["plain"], strict=True))


@pytest.mark.parametrize(
    "experiment", [regression.EXPERIMENT, permuted.EXPERIMENT], ids=lambda experiment: experiment.name
)
def test_weights_are_drawn_anew_from_what_they_were_drawn_from(experiment: Experiment) -> None:
    make = regression.network if experiment is regression.EXPERIMENT else lambda: permuted.network(784)
    arm = experiment.arms["weights by utility"]
    model, _, _ = learner_of(arm, make, 0, "SGD", 0.1)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        initial: Any = initial_weights(layer.bio_mod)  # type: ignore[arg-type]
        bound = math.sqrt((3 if layer is layers[-1] else 6) / layer.in_features)
        assert not initial.is_normal
        assert initial.std * math.sqrt(3) == pytest.approx(bound, rel=1e-12)
        assert float(layer.weight.detach().abs().max()) <= bound
    assert float(layers[0].weight.detach().abs().max()) > 0.9 * math.sqrt(6 / layers[0].in_features)


# measures


def test_errors_come_before_steps_and_plain_learns_by_gradient_descent() -> None:
    stream, model = (
        regression.Stream(0),
        learner_of(regression.ARMS["plain"], regression.network, 0, "SGD", 0.01)[0],
    )
    first, second = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    w, b = first.weight.detach().double().clone(), first.bias.detach().double().clone()
    v, c = second.weight.detach().double()[0].clone(), second.bias.detach().double().clone()
    errors = []
    inputs, values = stream.block()
    for x, y in zip(inputs[:60].double(), values[:60].double(), strict=True):
        hidden = (w @ x + b).clamp(min=0)
        wrong = v @ hidden + c - y
        errors.append(float(wrong**2))
        back = v * (hidden > 0) * 2 * wrong
        v, c = v - 0.02 * wrong * hidden, c - 0.02 * wrong
        w, b = w - 0.01 * torch.outer(back, x), b - 0.01 * back
    found = execute(regression.EXPERIMENT, job_of(regression.EXPERIMENT, "plain"), digits).found
    assert found.curves["error"] == [pytest.approx(sum(errors) / 60, rel=1e-5)]
    assert found.figures["late"] == found.curves["error"][0]
    assert found.at == [60]


def test_dead_units_are_those_that_no_input_reaches() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        nn.init.constant_(layer.weight, 1.0)
        layer.bias.data = torch.tensor([-10.0, 0.0, 0.0, -0.9 if layer is model[0] else -100.0])
    assert dead_units(model, torch.tensor([[0.0, 0.0], [1.0, 0.0]])) == 100 * 3 / 8
    assert dead_units(model, torch.tensor([[0.0, 0.0], [0.5, 0.0]])) == 100 * 4 / 8
    assert not any(module._forward_hooks for module in model)


def test_parts_of_a_stream() -> None:
    values = [float(value) for value in range(10)]
    assert [part_mean(values, 0, 0.2), part_mean(values, 0.8, 1), part_mean([3.0], 0.8, 1)] == [0.5, 8.5, 3]


def test_what_is_no_longer_finite_is_said_and_does_not_stop_the_others() -> None:
    for experiment in LEARNING_ON:
        job = job_of(experiment, list(experiment.arms)[-1], rate=1e30)
        found = execute(experiment, job, digits).found
        first = found.figures[next(iter(experiment.measures))]
        assert not math.isfinite(first) or first < 60
        assert all(len(curve) == len(found.at) for curve in found.curves.values())


# from end to end


@pytest.mark.parametrize("experiment", LEARNING_ON, ids=lambda experiment: experiment.name)
def test_an_experiment_from_end_to_end_and_again(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [experiment.name, "--out", str(tmp_path), "--seeds", "0", "1", "--fixed"]
    arguments += ["--short", *TINY[experiment.name]]
    assert command.main(arguments) == 0
    folder = tmp_path / experiment.name
    table, png = (folder / "table.md").read_text(), (folder / "plot.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    for arm in experiment.arms:
        assert f"| {arm} |" in table
    for entry in experiment.published:
        assert entry.figure in table
    summary = json.loads((folder / "results.json").read_text())
    assert len(summary["rows"]) == len(experiment.arms) * len(experiment.cases)
    assert [entry["claim"] for entry in summary["claims"]] == [claim.text for claim in experiment.claims]
    first = next(iter(experiment.measures))
    for row in summary["rows"]:
        plain = next(r for r in summary["rows"] if r["case"] == row["case"] and r["arm"] == "plain")
        pairs = zip(row[first], plain[first], strict=True)
        expected = None if row["arm"] == "plain" else [own - other for own, other in pairs]
        assert row["differences"] == expected
    monkeypatch.setattr(command, "execute", lambda *_: pytest.fail("a finished run was run again"))
    assert command.main(arguments) == 0
    assert (folder / "table.md").read_text() == table
    assert "of them finished already" in capsys.readouterr().err
