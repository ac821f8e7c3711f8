from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from biofx.cli import main
from biofx.demo import run_demo


def test_demo_trains_both_networks_and_a_seed_reproduces_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    first = run_demo(seed=1, epochs=3, folder=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = run_demo(seed=1, epochs=3, folder=tmp_path / "b")
    assert [vars(run) for run in first] == [vars(run) for run in second]
    assert [run.name for run in first] == ["plain", "bio"]
    for run in first:
        assert run.losses[-1] < run.losses[0] / 2
        assert run.accuracies[-1] > 0.8
    assert first[0].losses != first[1].losses
    printed = capsys.readouterr().out
    assert "= fold_weight(block1_conv1_" in printed
    assert "handwritten digits" in printed


def test_demo_writes_curves_report_and_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--epochs", "1"]) == 0
    folder = tmp_path / "biofx-demo"
    written = {"curves.png", "report.html", "report.json", "results.json"}
    assert {path.name for path in folder.iterdir()} == written
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert {entry["name"] for entry in report["passes"]} == {
        "split-weights",
        "constrain-signs",
        "scale-gradients",
        "fold-splits",
    }
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert len(results["runs"][1]["losses"]) == 1


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 1
    assert "the demo needs scikit-learn: pip install 'biofx[demo]'" in capsys.readouterr().err
