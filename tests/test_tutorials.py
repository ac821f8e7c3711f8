"""The tutorials run, and what they say holds."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import biofx

FOLDER = Path(__file__).parent.parent / "tools" / "tutorials"


@pytest.fixture
def tutorial(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A tutorial as it is run from its folder, on a few digits."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(request.param, FOLDER / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, request.param, module)
    spec.loader.exec_module(module)
    if hasattr(module, "digits"):
        train, test = module.digits()
        few = (train[0][:400], train[1][:400])
        monkeypatch.setattr(module, "digits", lambda: (few, test))
        monkeypatch.delitem(sys.modules, "learning")
    return module


@pytest.mark.parametrize("tutorial", ["pretrained_dale"], indirect=True)
def test_a_pretrained_network_keeps_its_accuracy_under_dale(
    tutorial: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tutorial.main(tmp_path, epochs=2)
    told = capsys.readouterr().out
    shown = dict(re.findall(r"^(pretrained|with signs|after fine-tuning|deployed): +([0-9.]+)%", told, re.M))
    assert len(shown) == 4
    assert float(shown["pretrained"]) > 20
    assert shown["with signs"] == shown["pretrained"]
    assert shown["after fine-tuning"] != shown["pretrained"]
    assert shown["deployed"] == shown["after fine-tuning"]
    assert "its 16 units became 16 excitatory and 16 inhibitory ones" in told
    assert "every invariant holds" in told
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "<svg" in (tmp_path / "graph.svg").read_text(encoding="utf-8")
    assert isinstance(torch.load(tmp_path / "deployed.pt", weights_only=False), torch.nn.Module)


@pytest.mark.parametrize("tutorial", ["transformer_plasticity"], indirect=True)
def test_a_transformer_learns_with_plasticity(
    tutorial: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.jsonl").write_text("what an earlier run left\n")
    tutorial.main(tmp_path, epochs=6)
    told = capsys.readouterr().out
    applied = re.findall(r"applied (\S+): 2048 factors, lognormal", told)
    assert applied == [f"encoder.layers.{place}.linear{number}" for place in (0, 1) for number in (1, 2)]
    assert "equal to the last bit: True" in told
    assert "factors act on the update of each weight" in told
    before, after = map(float, re.findall(r"^(?:before|after): +([0-9.]+)%", told, re.M))
    assert after > before + 15
    assert "48 steps" in told
    assert "every invariant holds" in told
    replaced = dict(re.findall(r"  (\S+): (\d+) replaced", told))
    assert int(replaced["encoder.layers.0.linear1.weight"]) > 0
    records = biofx.Monitor.read(tmp_path / "run.jsonl").records
    assert [record.step for record in records] == list(range(0, 48, 5))
    for picture in ("run.png", "layers.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")  # of neurogym and gymnasium
@pytest.mark.parametrize("tutorial", ["ei_network"], indirect=True)
def test_excitatory_and_inhibitory_units_learn_to_decide(
    tutorial: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("neurogym", reason="the tutorial needs neurogym: pip install -e '.[neuro]'")
    drawn: list[Any] = []
    draw: Callable[[list[Any], Path], None] = tutorial.draw

    def drawing(networks: list[Any], path: Path) -> None:
        drawn.extend(networks)
        draw(networks, path)

    monkeypatch.setattr(tutorial, "draw", drawing)
    tutorial.main(tmp_path, loop_steps=60, layer_steps=5)
    told = capsys.readouterr().out
    assert (
        told.count("80 excitatory and 20 inhibitory presynaptic units") == 4
    )  # recurrent weights and readouts
    assert told.count("none of 100 self-connections") == 2
    assert told.count("every invariant holds") == 2
    right = [float(share) for share in re.findall(r"decides right in ([0-9.]+) ±", told)]
    assert right[0] > 65
    signs = torch.tensor(tutorial.SIGNS)
    for network in drawn:
        assert not torch.equal(network.before, network.after)
        for weights in (network.before, network.after):
            assert not bool((weights * signs < 0).any())
            assert not bool(weights.diagonal().any())
            assert bool((weights != 0).any(0).all())
        coherences, shares, _ = zip(*network.psychometric, strict=True)
        assert len(coherences) == 13
        assert all(0 <= share <= 100 for share in shares)
    assert drawn[0].psychometric[-1][1] - drawn[0].psychometric[0][1] > 50
    assert (tmp_path / "networks.png").read_bytes().startswith(b"\x89PNG")
