"""The experiment desk: paired, repeatable, resumable, and fair to its controls."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import biofx
from reproduce import command
from reproduce.arms import build
from reproduce.command import execute
from reproduce.data import NONE, digits, loader
from reproduce.experiment import Arm, Case, Claim, Experiment, Job, Load, Measure, Measured, Published
from reproduce.experiments import EXPERIMENTS, ablations
from reproduce.networks import NETWORKS
from reproduce.runs import Result, Results
from reproduce.summary import rows, to_markdown, verdicts
from reproduce.training import train

ROOT = Path(__file__).parent.parent
SHAPE = (1, 8, 8)
ARMS = ablations.ARMS
TINY = ["ablations", "--cases", "perceptron", "--arms", "Dale", "--rates", "0.05", "--short"]
TINY += ["perceptron-epochs=1"]


def files(folder: Path, name: str = "ablations") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / name / "runs").iterdir())}


def job_of(arm: str, rate: float, seed: int, *, case: str = "perceptron", dataset: str = "digits") -> Job:
    return Job(
        experiment="ablations",
        dataset=dataset,
        case=case,
        arm=arm,
        rate=rate,
        seed=seed,
        lengths=(("perceptron-epochs", 1), ("residual-epochs", 1)),
    )


def ablate(job: Job, load: Load = digits) -> dict[str, float]:
    return dict(execute(ablations.EXPERIMENT, job, load).found.figures)


# arms and controls


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.control])
def test_an_arm_and_its_control_begin_as_the_same_network(name: str, network: str) -> None:
    images = digits(0).test[0][:40]
    arm, control = (
        build(ARMS[chosen], lambda: NETWORKS[network].make(SHAPE), 3)[0]
        for chosen in (name, ARMS[name].control or "")
    )
    plain = {key: value for key, value in control.state_dict().items() if "bio_mod" not in key}
    own = {key: value for key, value in arm.state_dict().items() if "bio_mod" not in key}
    assert list(own) == list(plain)
    assert all(torch.equal(own[key], plain[key]) for key in own)
    assert sum(p.numel() for p in arm.parameters()) == sum(p.numel() for p in control.parameters())
    same = torch.equal(arm(images), control(images))
    assert same == (name != "split in 2")


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model(images).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_levelled_rates_have_the_arms_mean_and_no_spread() -> None:
    images = digits(0).test[0][:40]
    built = [
        build(ARMS[name], lambda: NETWORKS["perceptron"].make(SHAPE), 0)[0]
        for name in ("plain", "fuzzy rates", "mean rates")
    ]
    plain, fuzzy, mean = (gradients(model, images)["1.weight"] for model in built)
    felt = plain.abs() > 1e-6
    assert (fuzzy / plain)[felt].std() > 0.2
    ratio = (mean / plain)[felt]
    drawn: Any = built[1].get_submodule("1.bio_mod")
    torch.testing.assert_close(ratio, drawn.fuzzy_learning_rate_parameters.mean().expand_as(ratio))


def test_crystallization_goes_on_in_the_levelled_control() -> None:
    arm = ARMS["crystallizing mean"]
    model, observers = build(arm, lambda: NETWORKS["perceptron"].make(SHAPE), 0)
    train(model, digits(0), rate=0.1, epochs=2, seed=0, rules=arm.rules, observers=observers)
    factors = [
        module.acting_factors
        for module in model.modules()
        if isinstance(module, biofx.BioModule) and module.acting_factors is not None
    ]
    assert len(factors) == 5
    assert all(values.min() == values.max() for values in factors)
    assert min(float(values.min()) for values in factors) < 0.99


def test_a_network_whose_weights_are_not_finite_is_measured_all_the_same() -> None:
    assert ablate(job_of("turnover", 1e12, 0))["validation"] < 25


# runs


def test_a_run_is_decided_by_its_job_alone() -> None:
    jobs = [job_of("fuzzy rates", 0.05, seed, case="residual") for seed in (1, 2)]
    state = torch.get_rng_state()
    first = ablate(jobs[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert ablate(jobs[0]) == first
    assert ablate(jobs[1]) != first


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*TINY, "--seeds", "0", "1"]
    assert command.main(["--out", str(tmp_path / "whole"), *arguments]) == 0
    whole = files(tmp_path / "whole")
    assert len(whole) == 4
    folder = tmp_path / "killed"
    done: list[Job] = []

    def killed(experiment: Experiment, job: Job, load: Load) -> Result:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return execute(experiment, job, load)

    monkeypatch.setattr(command, "execute", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--out", str(folder), *arguments])
    before = files(folder)
    assert len(before) == 2
    assert not (folder / "ablations" / "table.md").exists()
    resumed: list[Job] = []

    def noted(experiment: Experiment, job: Job, load: Load) -> Result:
        resumed.append(job)
        return execute(experiment, job, load)

    monkeypatch.setattr(command, "execute", noted)
    # what a process leaves that is killed while it writes is in nobody's way
    (folder / "ablations" / "runs" / ".half").write_text('{"job": ')
    assert command.main(["--out", str(folder), *arguments]) == 0
    (folder / "ablations" / "runs" / ".half").unlink()
    assert len(resumed) == 2
    assert not set(resumed) & set(done)
    assert files(folder) == whole
    for name in ("table.md", "results.json"):
        assert (folder / "ablations" / name).read_bytes() == (
            tmp_path / "whole" / "ablations" / name
        ).read_bytes()
    assert (folder / "ablations" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_that_is_damaged_or_of_another_version_is_refused(tmp_path: Path) -> None:
    results, job = Results(tmp_path), job_of("plain", 0.05, 0)
    assert results.find(job) is None
    found = Result(job, Measured({"test": 50.0}, {"error": [1.0, 0.5]}, [10, 20]))
    results.keep(found)
    assert results.find(job) == found
    path = tmp_path / job.file_name
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "versions": {"biofx": "0.0.1", "torch": "1.0"}}))
    with pytest.raises(
        biofx.errors.InputError, match=r"expected a result of .* found one of .*'torch': '1.0'"
    ):
        results.find(job)
    path.write_text(json.dumps(content)[:-20])
    with pytest.raises(biofx.errors.InputError, match="delete it, and it will be run again"):
        results.find(job)


def test_ranks_share_the_runs_and_the_last_one_sums_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*TINY, "--seeds", "0", "1"]
    assert command.main(["--out", str(tmp_path / "one"), *arguments]) == 0
    folder = tmp_path / "two"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert command.main(["--out", str(folder), *arguments]) == 0
    assert len(files(folder)) == 2
    assert not (folder / "ablations" / "table.md").exists()
    done = subprocess.run(
        [sys.executable, "tools/reproduce", "--out", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "RANK": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 runs, 0 of them finished already" in done.stderr
    assert "sign-free" in done.stdout
    assert files(folder) == files(tmp_path / "one")
    assert (folder / "ablations" / "table.md").read_text() == (
        tmp_path / "one" / "ablations" / "table.md"
    ).read_text()


# table


def an_experiment(**changes: Any) -> Experiment:
    defaults: dict[str, Any] = {
        "name": "made up",
        "about": "for the test",
        "source": "nobody",
        "run": lambda job, load: Measured({}),
        "arms": {"plain": Arm(control=None), "bio": Arm(about="of the test")},
        "cases": {"SGD": Case(0.1, (0.1, 0.2))},
        "measures": {"test": Measure("accuracy [%]"), "dead": Measure("dead [%]", digits=1)},
        "validation": "validation",
        "lengths": {"steps": 1000},
        "short": {"steps": 10},
        "seeds": 2,
    }
    return Experiment(**(defaults | changes))


FOUND = {
    # arm, rate, seed: validation, test
    ("bio", 0.1, 0): (80, 70),
    ("bio", 0.1, 1): (82, 72),
    ("bio", 0.2, 0): (70, 99),
    ("bio", 0.2, 1): (70, 99),
    ("plain", 0.1, 0): (60, 90),
    ("plain", 0.1, 1): (60, 94),
    ("plain", 0.2, 0): (90, 73),
    ("plain", 0.2, 1): (90, 79),
}


def results_of(found: Any) -> list[Result]:
    made = []
    for (arm, rate, seed), (validation, test) in reversed(found.items()):
        job = Job(experiment="made up", dataset=NONE, case="SGD", arm=arm, rate=rate, seed=seed, lengths=())
        made.append(Result(job, Measured({"test": test, "dead": 3, "validation": validation})))
    return made


def test_rates_are_published_and_chosen_and_differences_are_paired_by_seed() -> None:
    experiment = an_experiment()
    found = rows(experiment, results_of(FOUND))
    assert [(row.arm, row.rate, row.chosen) for row in found] == [
        ("plain", 0.1, False),
        ("bio", 0.1, False),
        ("plain", 0.2, True),
        ("bio", 0.1, True),
    ]
    assert [row.values("test") for row in found] == [[90, 94], [70, 72], [73, 79], [70, 72]]
    assert [row.differences("test") for row in found] == [None, [-20, -22], None, [-3, -7]]
    text = to_markdown(experiment, found, "title")
    assert "| SGD | bio | 0.1 (chosen) | 71.00 ± 1.00 | 3.0 ± 0.0 | -5.00 ± 2.00 |" in text
    assert "| SGD | bio | 0.1 | 71.00 ± 1.00 | 3.0 ± 0.0 | -21.00 ± 1.00 |" in text
    assert "\n- bio: of the test\n" in text


def test_errors_choose_the_rate_at_which_they_are_low_and_those_not_finite_are_never_chosen() -> None:
    experiment = an_experiment(validation_lower_is_better=True)
    chosen = {row.arm: row.rate for row in rows(experiment, results_of(FOUND)) if row.chosen}
    assert chosen == {"plain": 0.1, "bio": 0.2}
    burst = FOUND | {("bio", 0.2, 0): (float("nan"), float("nan"))}
    chosen = {row.arm: row.rate for row in rows(experiment, results_of(burst)) if row.chosen}
    assert chosen == {"plain": 0.1, "bio": 0.1}


def test_claims_are_judged_at_the_published_rate() -> None:
    experiment = an_experiment(
        published=(Published("plain", "92"),),
        claims=(
            Claim(
                "bio loses 20 to 22", lambda of: of("SGD", "plain", "test") - of("SGD", "bio", "test"), 20, 22
            ),
            Claim("bio reaches 80", lambda of: of("SGD", "bio", "test"), 80),
            Claim("Adam too", lambda of: of("Adam", "bio", "test"), 80),
        ),
    )
    found = rows(experiment, results_of(FOUND))
    assert [(entry["found"], entry["shown"]) for entry in verdicts(experiment, found)] == [
        (21, True),
        (71, False),
        (None, False),
    ]
    text = to_markdown(experiment, found, "title")
    for line in ("| plain | 92 |", "| bio loses 20 to 22 | 21 | yes |", "| bio reaches 80 | 71 | no |"):
        assert line in text
    assert "| Adam too | not run | no |" in text


def test_the_experiments_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_an_experiment_refers_to_what_it_has(experiment: Experiment) -> None:
    assert {arm.control for arm in experiment.arms.values()} <= {None, *experiment.arms}
    assert set(experiment.short) == set(experiment.lengths)
    assert all(case.rates for case in experiment.cases.values())
    asked: list[tuple[str, str, str]] = []

    def figure(*names: str) -> float:
        case, arm, measure = names
        asked.append((case, arm, measure))
        return 1.0

    for claim in experiment.claims:
        claim.value(figure)
    for case, arm, measure in asked:
        assert (case in experiment.cases, arm in experiment.arms) == (True, True)
        assert measure in experiment.measures


# data


def idx(values: Any) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    return header + bytes(values.tobytes())


def test_mnist_is_read_from_a_folder(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images: Any = None
    for name, count in (("train", 40), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        packed = gzip.compress(idx(images))
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(packed)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels))
    data = loader("mnist", tmp_path)(0)
    assert data.shape == (1, 28, 28)
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [36, 4, 10]
    assert torch.equal(data.test[0][:, 0], torch.from_numpy(images).float() / 255)
    assert data.test[1].tolist() == list(range(10))
    job = job_of("plain", 0.05, 0, case="residual", dataset="mnist")
    assert ablate(job, loader("mnist", tmp_path)) == ablate(job, loader("fashion-mnist", tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels)[:-1])
    with pytest.raises(biofx.errors.InputError, match="expected an idx file of bytes in 1 dimensions"):
        loader("mnist", tmp_path)


def write_cifar(folder: Path) -> Any:
    """Write batches as Python 2 pickled them: keys and values of bytes."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        images = random.integers(0, 256, (8, 3072), dtype=np.uint8)
        batch = {b"data": images, b"labels": [value % 10 for value in range(8)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return images


def test_cifar_is_read_from_a_folder(tmp_path: Path) -> None:
    last = write_cifar(tmp_path / "cifar-10-batches-py")
    data = loader("cifar10", tmp_path)(0)
    assert data.shape == (3, 32, 32)
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [36, 4, 8]
    raw = torch.from_numpy(last).reshape(8, 3, 32, 32).float()
    reds = data.test[0][:, 0]
    scale = reds.std() / raw[:, 0].std()
    torch.testing.assert_close(reds - reds.mean(), scale * (raw[:, 0] - raw[:, 0].mean()))
    whole = torch.cat([data.train[0], data.validation[0]])
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert ablate(job_of("plain", 0.05, 0, case="residual"), loader("cifar10", tmp_path))["test"] <= 100


class Stranger:
    """What a pickle runs when it is read without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def test_a_pickle_of_something_else_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({b"data": Stranger()}))
    with pytest.raises(biofx.errors.InputError, match="no part of an array"):
        loader("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "expected --data FOLDER"),
        (["--dataset", "mnist", "--data", "."], "cannot read train-images-idx3-ubyte"),
        (["--dataset", "cifar10", "--data", "."], "cannot read data_batch_1"),
        (["--data", "."], "cannot read train-images-idx3-ubyte"),
        (["--short", "epochs=2"], "expected NAME=NUMBER >= 1 of perceptron-epochs=30, residual-epochs=12"),
        (["--short", "residual-epochs=0"], "found 'residual-epochs=0'"),
        (["--seeds", "-1"], "--seeds >= 0"),
        (["--arms", "Dahl"], "found 'Dahl'"),
        (["--cases", "SGD"], "expected some of 'perceptron', 'residual'"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["ablations", "--out", "results", *arguments]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "results" / "ablations" / "table.md").exists()
