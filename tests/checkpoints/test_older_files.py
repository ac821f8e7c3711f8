"""What version 0.1.0 has written still loads, and goes on as it did there."""

from __future__ import annotations

import base64
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biofx

STORED = Path(__file__).with_name("written_by_0_1_0.txt")
RULES: list[biofx.Rule | str] = [
    "crystallize",
    biofx.Rule("rejuvenate_weights", every=2),
    "volume_dependent_lr",
    "synaptic_scaling",
]
CONFIG = biofx.BioConfig(
    weight_splitting_Gamma=2,
    weight_splitting_activation_function=torch.relu,
    apply_dales_principle=True,
    fuzzy_lr_distribution=biofx.Distribution.ACTIVITY,
    fuzzy_lr_dynamic=True,
)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file and a folder with one run, after three steps, and its losses at the next three."""
    packed = zlib.decompress(base64.b64decode(STORED.read_text(encoding="ascii")))
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def attached(model: nn.Module) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    return optimizer, biofx.attach(model, optimizer, RULES)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    x, found = torch.linspace(-1, 1, 15).reshape(5, 3), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", ["file", "file into a plain model", "folder"])
def test_a_run_of_an_older_version_goes_on(kind: str, stored: Path) -> None:
    expected = json.loads((stored / "losses.json").read_text(encoding="ascii"))
    torch.manual_seed(8)
    if kind == "file into a plain model":
        model = biofx.load(stored / "run.pt", net())
    else:
        model, _ = biofx.transform(net(), CONFIG)
    optimizer, plasticity = attached(model)
    if kind == "folder":
        extra: Any = biofx.checkpoints.load_sharded(
            stored / "folder", model, optimizer=optimizer, plasticity=plasticity
        )
    else:
        saved = biofx.checkpoints.Checkpoint.read(stored / "run.pt")
        biofx.load(saved, model, optimizer=optimizer, plasticity=plasticity)
        extra = saved.extra
    assert extra == {"epoch": 3}
    assert plasticity.steps == 3
    assert optimizer.param_groups[0]["lr"] == 0.01
    torch.testing.assert_close(losses(model, optimizer), expected)


def test_its_folder_is_written_anew_without_what_it_held(stored: Path) -> None:
    model, _ = biofx.transform(net(), CONFIG)
    biofx.checkpoints.load_sharded(stored / "folder", model)
    biofx.checkpoints.save_sharded(model, stored / "folder")
    assert not (stored / "folder" / "__0_0.distcp").exists()
    assert len(list((stored / "folder").iterdir())) == 2
    biofx.checkpoints.load_sharded(stored / "folder", model)


def test_rates_in_a_byte_each_are_refused_with_the_way_out(tmp_path: Path) -> None:
    packed = base64.b64decode(STORED.with_name("codes_written_by_0_1_0.txt").read_text(encoding="ascii"))
    path = tmp_path / "codes.pt"
    path.write_bytes(zlib.decompress(packed))
    message = r"codes.pt: expected .* found '0.bio_mod.fuzzy_learning_rate_codes' .* biofx 0.1.0 reads them"
    plain = nn.Sequential(nn.Linear(3, 2))
    for model in (plain, biofx.transform(plain).graph_module):
        with pytest.raises(biofx.errors.CheckpointError, match=message):
            biofx.load(path, model)
    state = torch.load(path, weights_only=True)["model"]
    with pytest.raises(RuntimeError, match="which was removed"):
        biofx.transform(plain).graph_module.load_state_dict(state)
    with pytest.raises(biofx.errors.OptionError, match=r"dtype: .* 'uint8', which was removed"):
        biofx.Pipeline.parse("scale-gradients{dtype=uint8}")


def test_graph_of_sampled_factors_has_the_text_of_older_files() -> None:
    options = {"fuzzy_lr_dtype": "seed", "fuzzy_lr_granularity": "neuron"}
    bio_model, _ = biofx.transform(nn.Sequential(nn.Linear(4, 2)), options)
    assert (
        "_0_scaled = scale_gradient_by_seed(_0_weight, distribution='uniform', nu=0.16, low=0.5, high=2.0, "
        "seed=0, path='0.weight', granularity='neuron')"
    ) in biofx.format_graph(bio_model)
