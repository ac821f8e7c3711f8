"""``biofx check`` and ``biofx diff``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.cli import main
from biofx.diagnostics.differences import differences
from biofx.errors import InputError

SOURCE = """
import biofx
import torch
from torch import nn

CONFIG = biofx.BioConfig(apply_dales_principle=True)

def plain(width=6):
    return nn.Sequential(
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
    )

def wide():
    return plain(8)

def bio():
    return biofx.transform(plain(), CONFIG).graph_module

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_in, self.w_rec, self.w_out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 6)
        step = 0
        while step < x.shape[0]:
            h = torch.relu(self.w_in(x[step]) + self.w_rec(h))
            step += 1
        return self.w_out(h)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file of models in the current folder, and what it defines."""
    (tmp_path / "comparedmodels.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    from biofx.cli.targets import load_script

    yield load_script("comparedmodels.py")
    sys.modules.pop("comparedmodels", None)


def test_check_audits_what_a_checkpoint_holds(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bio = models.bio()
    biofx.save(bio, "sound.pt")
    assert main(["check", "sound.pt", "comparedmodels.py:plain", "--json", "audit.json"]) == 0
    assert "every invariant holds" in capsys.readouterr().out
    assert json.loads(Path("audit.json").read_text(encoding="utf-8"))["ok"] is True
    assert main(["check", "sound.pt", "comparedmodels.py:bio", "--quiet"]) == 0
    with torch.no_grad():
        bio.get_parameter("2.weight")[0, :2] = float("nan")
    biofx.save(bio, "broken.pt")
    assert main(["check", "broken.pt", "comparedmodels.py:plain"]) == 3
    assert "2 of 36 numbers are NaN" in " ".join(capsys.readouterr().out.split())
    assert main(["check", "broken.pt", "comparedmodels.py:wide"]) == 1
    assert "expected shape (8, 4), found (6, 4)" in capsys.readouterr().err
    assert main(["check", "none.pt", "comparedmodels.py:plain"]) == 1
    assert "none.pt" in capsys.readouterr().err


def test_check_asks_for_the_example_inputs_that_a_checkpoint_does_not_hold(
    models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bio, _ = biofx.transform(models.Recurrent(), models.CONFIG, example_inputs=torch.randn(5, 4, 3))
    biofx.save(bio, "run.pt")
    command = ["check", "run.pt", "comparedmodels.py:Recurrent"]
    assert main(command) == 1
    assert '--example "torch.randn(12, 4, 3)"' in capsys.readouterr().err
    assert main([*command, "--example", "torch.randn(5, 4, 3)"]) == 0
    assert "every invariant holds" in capsys.readouterr().out


def test_diff_of_models_says_what_differs(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "comparedmodels.py:plain", "comparedmodels.py:wide"]) == 3
    printed = capsys.readouterr().out
    assert "module 0: Linear(in_features=4, out_features=6, bias=True) → Linear(in_features=4, out" in printed
    assert "0.weight: (6, 4) of float32 → (8, 4) of float32" in printed
    assert main(["diff", "comparedmodels.py:plain", "comparedmodels.py:plain", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_diff_of_configs_and_of_checkpoints(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    biofx.BioConfig(seed=1).override("0", weight_splitting_Gamma=2).to_toml("one.toml")
    biofx.BioConfig(seed=2).override("0", weight_splitting_Gamma=3).to_toml("other.toml")
    assert main(["diff", "one.toml", "other.toml"]) == 3
    assert capsys.readouterr().out.splitlines() == [
        "seed: 1 → 2",
        "override: only in A: 0: weight_splitting_Gamma=2",
        "override: only in B: 0: weight_splitting_Gamma=3",
    ]
    assert main(["diff", "one.toml", "one.toml"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    bio = models.bio()
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    plasticity = biofx.attach(bio, optimizer)
    biofx.save(bio, "one.pt", optimizer=optimizer, plasticity=plasticity, extra={"epoch": 1})
    bio(torch.ones(3, 4)).square().mean().backward()
    optimizer.step()
    biofx.save(bio, "other.pt", optimizer=optimizer, plasticity=plasticity, extra={"epoch": 2})
    assert main(["diff", "one.pt", "other.pt"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert "attachment 0, steps: 0 → 1" in lines
    assert "extra epoch: 1 → 2" in lines
    assert any(line.startswith("4.bias: 2 of 2 numbers differ, by at most ") for line in lines)
    assert not any("sign" in line for line in lines)


def test_a_long_list_is_cut_unless_all_is_asked_for(models: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wide = biofx.transform(models.wide(), models.CONFIG.override("0", weight_splitting_Gamma=2)).graph_module
    biofx.save(models.bio(), "one.pt")
    biofx.save(wide, "other.pt")
    assert main(["diff", "one.pt", "other.pt"]) == 3
    short = capsys.readouterr().out.splitlines()
    assert len(short) == 20
    assert main(["diff", "one.pt", "other.pt", "--all"]) == 3
    whole = capsys.readouterr().out.splitlines()
    assert short[-1] == f"… and {len(whole) - 19} more: --all shows them"
    assert short[:-1] == whole[:19]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("one.toml", "comparedmodels.py:plain", "found a BioConfig and a Sequential"),
        ("nowhere", "one.toml", "or a file, found 'nowhere'"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    one: str, other: str, message: str, models: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    biofx.BioConfig().to_toml("one.toml")
    assert main(["diff", one, other]) == 1
    assert message in capsys.readouterr().err


def test_differences_of_numbers_flags_and_nothing() -> None:
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    other.load_state_dict(one.state_dict())
    assert differences(one, other) == []
    other.weight.requires_grad_(False)
    with torch.no_grad():
        other.bias[0] += 0.5
        other.bias[1] = float("nan")
        one.weight[0, 0] = other.weight[0, 0] = float("nan")
    assert differences(one, other) == [
        "bias: 2 of 3 numbers differ, by at most 0.5, of 1 one alone is NaN",
        "weight: trained → frozen",
    ]
    assert differences(nn.ReLU(), nn.Tanh()) == ["class: 'ReLU' → 'Tanh'"]
    with pytest.raises(InputError, match="expected two configs, two checkpoints or two models, found a int"):
        differences(3, one)
