"""The grid of mechanisms, networks and seeds: paired, repeatable, resumable, and fair to its controls."""

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
from reproduce.arms import ARMS, MECHANISMS, build
from reproduce.data import digits, loader
from reproduce.networks import NETWORKS
from reproduce.runs import Job, Result, Results, execute
from reproduce.summary import contrasts, rows, to_markdown
from reproduce.training import train

ROOT = Path(__file__).parent.parent
SHAPE = (1, 8, 8)
TINY = ["--network", "perceptron", "--mechanism", "dale", "--rates", "0.05", "--epochs", "1"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "runs").iterdir())}


# arms and controls


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", MECHANISMS)
def test_an_arm_and_its_control_begin_as_the_same_network(name: str, network: str) -> None:
    mechanism = MECHANISMS[name]
    images = digits(0).test[0][:40]
    arm, control = (
        build(ARMS[chosen], lambda: NETWORKS[network].make(SHAPE), 3)[0]
        for chosen in (mechanism.arm, mechanism.control)
    )
    plain = {key: value for key, value in control.state_dict().items() if "bio_mod" not in key}
    own = {key: value for key, value in arm.state_dict().items() if "bio_mod" not in key}
    assert list(own) == list(plain)
    assert all(torch.equal(own[key], plain[key]) for key in own)
    assert sum(p.numel() for p in arm.parameters()) == sum(p.numel() for p in control.parameters())
    same = torch.equal(arm(images), control(images))
    assert same == (name != "splitting")


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
    job = Job("digits", "perceptron", "turnover", 1e12, 0, 3)
    assert execute(job, digits).validation < 25


# runs


def test_a_run_is_decided_by_its_job_alone() -> None:
    jobs = [Job("digits", "residual", "fuzzy rates", 0.05, seed, 1) for seed in (1, 2)]
    state = torch.get_rng_state()
    first = execute(jobs[0], digits)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert execute(jobs[0], digits) == first
    other = execute(jobs[1], digits)
    assert (other.validation, other.test) != (first.validation, first.test)


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*TINY, "--seeds", "0", "1"]
    assert command.main(["--out", str(tmp_path / "whole"), *arguments]) == 0
    whole = files(tmp_path / "whole")
    assert len(whole) == 4
    folder = tmp_path / "killed"
    done: list[Job] = []

    def killed(job: Job, load: Any) -> Result:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return execute(job, load)

    monkeypatch.setattr(command, "execute", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--out", str(folder), *arguments])
    before = files(folder)
    assert len(before) == 2
    assert not (folder / "table.md").exists()
    resumed: list[Job] = []

    def noted(job: Job, load: Any) -> Result:
        resumed.append(job)
        return execute(job, load)

    monkeypatch.setattr(command, "execute", noted)
    # what a process leaves that is killed while it writes is in nobody's way
    (folder / "runs" / ".half").write_text('{"job": ')
    assert command.main(["--out", str(folder), *arguments]) == 0
    (folder / "runs" / ".half").unlink()
    assert len(resumed) == 2
    assert not set(resumed) & set(done)
    assert files(folder) == whole
    for name in ("table.md", "results.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_that_is_damaged_or_of_another_version_is_refused(tmp_path: Path) -> None:
    results, job = Results(tmp_path), Job("digits", "perceptron", "plain", 0.05, 0, 1)
    assert results.find(job) is None
    results.keep(Result(job, 5, 50.0, 60.0))
    assert results.find(job) == Result(job, 5, 50.0, 60.0)
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
    assert not (folder / "table.md").exists()
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
    assert (folder / "table.md").read_text() == (tmp_path / "one" / "table.md").read_text()


# table


def test_rates_are_chosen_on_validation_and_differences_are_paired_by_seed() -> None:
    found = {
        # arm, rate, seed: validation, test
        ("Dale", 0.1, 0): (80, 70),
        ("Dale", 0.1, 1): (82, 72),
        ("Dale", 0.2, 0): (70, 99),
        ("Dale", 0.2, 1): (70, 99),
        ("sign-free", 0.1, 0): (60, 99),
        ("sign-free", 0.1, 1): (60, 99),
        ("sign-free", 0.2, 0): (90, 73),
        ("sign-free", 0.2, 1): (90, 79),
    }
    results = [
        Result(Job("digits", "perceptron", arm, rate, seed, 1), 7, validation, test)
        for (arm, rate, seed), (validation, test) in reversed(found.items())
    ]
    (contrast,) = contrasts(rows(results), ["dale"])
    assert [contrast.arm.rate, contrast.control.rate] == [0.1, 0.2]
    assert [*contrast.arm.test, *contrast.control.test] == [70, 72, 73, 79]
    assert list(contrast.differences) == [-3, -7]
    assert "| 0.1 | 71.00 ± 1.00 | sign-free | 0.2 | 76.00 ± 3.00 | -5.00 ± 2.00 |" in to_markdown([contrast])


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
    job = Job("mnist", "residual", "plain", 0.05, 0, 1)
    assert execute(job, loader("mnist", tmp_path)) == execute(job, loader("mnist", tmp_path))
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
    assert execute(Job("cifar10", "residual", "plain", 0.05, 0, 1), loader("cifar10", tmp_path)).test <= 100


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
        (["--epochs", "0"], "--epochs >= 1"),
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
    assert command.main(["--out", "results", *arguments]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "results" / "table.md").exists()
