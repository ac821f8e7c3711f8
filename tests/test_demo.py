from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from biofx.cli import main
from biofx.demo import DigitNet, run_demo, run_digits
from biofx.demo.continual import ACCURACY, CONFIG, SILENT, permuted_digits_network, silent_units
from biofx.demo.curves import BIO, PLAIN, Outcome, mean_and_error, with_error
from biofx.demo.data import load_digits
from biofx.operators.sampling import generator_for
from biofx.transform import transform

FILES = {"curves.png", "report.html", "report.json", "results.json"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path, str]:
    """Run the demo once, at half its length; return what it found, wrote and printed."""
    folder = tmp_path_factory.mktemp("demo")
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        printed = _Terminal()
        patch.setattr(sys, "stdout", printed)
        patch.setenv("COLUMNS", "80")
        outcome = run_demo(seed=3, seeds=3, tasks=28, folder=folder)
    assert torch.equal(torch.get_rng_state(), state)
    return outcome, folder, printed.text


class _Terminal:
    """Something to print to, which is no terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def test_the_plain_network_loses_plasticity_and_the_rewritten_one_does_not(
    demo: tuple[Outcome, Path, str],
) -> None:
    outcome, _, _ = demo
    plain, bio = outcome.curves(PLAIN, ACCURACY), outcome.curves(BIO, ACCURACY)
    assert plain.shape == bio.shape == (3, 28)
    first, last = slice(4), slice(-6, None)

    def apart(values: torch.Tensor) -> tuple[float, float]:
        mean, error = mean_and_error(values)
        return mean.item(), error.item()

    gap, error = apart(bio[:, last].mean(1) - plain[:, last].mean(1))
    assert gap > 0.1
    assert gap > 4 * error
    gap, _ = apart(bio[:, first].mean(1) - plain[:, first].mean(1))
    assert abs(gap) < 0.04
    lost, error = apart(plain[:, first].mean(1) - plain[:, last].mean(1))
    assert lost > 0.08
    assert lost > 3 * error
    kept, _ = apart(bio[:, last].mean(1) - bio[:, first].mean(1))
    assert kept > -0.02
    silent = outcome.curves(PLAIN, SILENT)[:, last].mean() - outcome.curves(BIO, SILENT)[:, last].mean()
    assert silent > 0.1
    assert all((run.replaced_units > 0) == (run.name == BIO) for run in outcome.runs)


def test_what_is_printed_fits_on_a_screen(demo: tuple[Outcome, Path, str]) -> None:
    outcome, folder, printed = demo
    lines = printed.splitlines()
    assert len(lines) <= 30
    assert all(len(line) <= 80 for line in lines if str(folder) not in line)
    last = outcome.curves(PLAIN, ACCURACY)[:, -4:].mean(1)
    row = next(line for line in lines if line.strip().startswith("plain"))
    assert with_error(last) in row
    assert "tasks 25 to 28" in printed
    assert len(printed.partition("Try next\n")[2].splitlines()) == 3


def test_files_hold_curves_the_whole_report_and_every_number(demo: tuple[Outcome, Path, str]) -> None:
    outcome, folder, printed = demo
    assert {path.name for path in folder.iterdir()} == FILES
    assert all(name in printed for name in FILES)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    remarks = [
        (entry["name"], remark["kind"], remark["layer"])
        for entry in report["passes"]
        for remark in entry["remarks"]
    ]
    assert remarks == [
        ("watch-units", "applied", "0"),
        ("watch-units", "applied", "2"),
        ("watch-units", "missed", "4"),
    ]
    assert "observe_inputs" in (folder / "report.html").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["seed"] == 3
    assert results["runs"] == [vars(run) for run in outcome.runs]


def test_the_plain_network_is_trained_as_one_would_by_hand(demo: tuple[Outcome, Path, str]) -> None:
    outcome, _, _ = demo
    images, labels = load_digits()
    pixels = ((images - images.mean()) / images.std()).reshape(-1, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        network = nn.Sequential(
            nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    for task in range(2):
        generator = generator_for(4, "permuted digits", task, purpose="demo")
        order = torch.randperm(64, generator=generator)
        right = 0
        for batch in torch.randperm(1797, generator=generator).split(32):
            logits = network(pixels[batch][:, order])
            right += int((logits.argmax(1) == labels[batch]).sum())
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
        assert outcome.curves(PLAIN, ACCURACY)[1, task].item() == pytest.approx(right / 1797)


def test_a_seed_reproduces_the_demo_and_another_gives_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_demo(seed=1, seeds=2, tasks=1, folder=tmp_path)
    torch.manual_seed(99)
    second = run_demo(seed=1, seeds=1, tasks=1, folder=tmp_path)
    assert [vars(run) for run in first.runs[:2]] == [vars(run) for run in second.runs]
    assert first.runs[0].measured != first.runs[2].measured
    assert [(run.name, run.seed) for run in first.runs] == [(PLAIN, 1), (BIO, 1), (PLAIN, 2), (BIO, 2)]
    assert "±" not in capsys.readouterr().out.rpartition("Learning that goes on")[2]


def test_silent_units_are_those_that_no_image_drives() -> None:
    network = permuted_digits_network()
    images = torch.rand(20, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        for layer, silent in zip(layers, (30, 5), strict=False):
            layer.weight.abs_()
            layer.bias.zero_()
            layer.weight[:silent].neg_()
    bio, _ = transform(network, CONFIG)
    for either in (network, bio):
        assert silent_units(either, images) == pytest.approx(35 / 200)
        assert either.training


def test_standard_errors() -> None:
    values = torch.tensor([[0.2, 1.0], [0.4, 1.0], [0.9, 1.0]], dtype=torch.float64)
    mean, error = mean_and_error(values)
    torch.testing.assert_close(mean, torch.tensor([0.5, 1.0], dtype=torch.float64))
    by_hand = math.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2 / 3)
    torch.testing.assert_close(error, torch.tensor([by_hand, 0.0], dtype=torch.float64))
    assert with_error(torch.tensor([0.5])) == "50.0"
    assert with_error(torch.tensor([0.25]), signed=True) == "+25.0"


def test_digits_are_learned_by_both_and_a_seed_reproduces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    assert main(["demo", "--digits", "--epochs", "3", "--seeds", "2", "--seed", "1"]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 30
    folder = tmp_path / "biofx-demo-digits"
    assert {path.name for path in folder.iterdir()} == FILES
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert {"split-weights", "constrain-signs", "scale-gradients", "fold-splits"} == {
        entry["name"] for entry in report["passes"]
    }
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["width"] == {"plain": 16, "bio": 32}
    assert results["settings"]["learning_rate"] == {"plain": 0.05, "bio": 0.0125}
    torch.manual_seed(99)
    again = run_digits(seed=2, seeds=1, epochs=3, folder=tmp_path / "again")
    assert results["runs"][2:] == [vars(run) for run in again.runs]
    for run in results["runs"]:
        assert run["measured"]["loss"][-1] < run["measured"]["loss"][0] / 2
        assert run["measured"]["accuracy"][-1] > 0.8


def test_models_of_the_demo_can_be_named_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transform", "biofx.demo:DigitNet", "--set", "weight_splitting_Gamma=2"]) == 0
    assert "block1" in capsys.readouterr().out
    assert DigitNet(8).readout.in_features == 32


@pytest.mark.parametrize(("package", "wheel"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
@pytest.mark.parametrize("arguments", [["demo"], ["demo", "--digits"]])
def test_missing_extra_is_named(
    arguments: list[str],
    package: str,
    wheel: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert f"the demo needs {wheel}: pip install 'biofx[demo]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
