"""Two ranks hold weights back as one process does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.two_ranks import run_on_two_ranks

COMMON = """
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import biofx

FOLDER = Path(sys.argv[1])
DISTRIBUTED = "RANK" in os.environ
if DISTRIBUTED:
    dist.init_process_group("gloo")
RANK = dist.get_rank() if DISTRIBUTED else 0
torch.set_num_threads(1)
RUNS = {
    "synaptic_intelligence": ("AdamW", {"consolidation": "synaptic-intelligence"}),
    "elastic_consolidation": ("SGD", {"consolidation": "elastic", "consolidation_decay": 0.5}),
    "fisher": ("SGD", {"consolidation": "elastic", "consolidation_effect": "rates"}),
    "memory_aware": ("SGD", {"consolidation": "memory-aware", "consolidation_effect": "rates"}),
    "upgd": ("SGD", {"consolidation": "upgd", "upgd_noise": 0.1, "upgd_utility_decay": 0.5}),
    "upgd_of_layers": ("AdamW", {"consolidation": "upgd", "upgd_scaling": "layer"}),
    "l2_to_initial": ("AdamW", {"l2_to_initial_strength": 0.1}),
}
NAMES = {"fisher": "elastic_consolidation", "upgd_of_layers": "upgd"}


def batch(step, *, whole=False):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    part = slice(8 * RANK, 8 * RANK + 8) if DISTRIBUTED and not whole else slice(None)
    return x[part], y[part]


def trained(how):
    found = {}
    for name, (stepping, options) in RUNS.items():
        torch.manual_seed(0)
        # 15 units do not fall into equal parts
        layers = [nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 15), nn.LayerNorm(15), nn.Linear(15, 4)]
        config = biofx.BioConfig(apply_dales_principle=True, dales_method="abs", consolidation_strength=5.0)
        model, _ = biofx.transform(nn.Sequential(*layers), config.replace(**options))
        if how == "FSDP2":
            fully_shard(model)
        wrapped = nn.parallel.DistributedDataParallel(model) if how == "DDP" else model
        options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 1e-2}}[stepping]
        optimizer = getattr(torch.optim, stepping)(wrapped.parameters(), **options)
        rules = [NAMES.get(name, name)]
        if name == "synaptic_intelligence":
            rules.append(biofx.Rule("rejuvenate_weights", after=5, every=100))
        attachment = biofx.attach(wrapped, optimizer, rules)
        for task in range(2):
            if name == "memory_aware":
                attachment.begin_task([batch(9, whole=how == "FSDP2")[0]])
            elif name == "fisher":
                attachment.begin_task([batch(9, whole=how == "FSDP2")], F.cross_entropy)
            elif name in ("synaptic_intelligence", "elastic_consolidation"):
                attachment.begin_task()
            for step in range(4 * task, 4 * task + 4):
                optimizer.zero_grad()
                inputs, target = batch(step)
                F.cross_entropy(wrapped(inputs), target).backward()
                optimizer.step()
        state = model.state_dict().items()
        found[name] = {
            key: (value.full_tensor() if hasattr(value, "full_tensor") else value).tolist()
            for key, value in state
        }
        if how == "FSDP2" and name == "memory_aware":
            try:
                attachment.begin_task([batch(RANK, whole=True)[0]])
            except biofx.errors.PlasticityError as error:
                found["refused"] = str(error)
    return found
"""
RANKS = """
found = {how: trained(how) for how in ("DDP", "FSDP2")}
(FOLDER / f"{RANK}.json").write_text(json.dumps(found))
time.sleep(1)
os._exit(0)
"""


def test_two_ranks_hold_back_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(COMMON + RANKS, encoding="utf-8")
    errors = run_on_two_ranks(script, tmp_path)
    said = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("*.json"))]
    assert len(said) == 2, errors
    monkeypatch.setattr(sys, "argv", ["ranks.py", str(tmp_path)])
    here: dict[str, Any] = {}
    exec(COMMON, here)
    alone = here["trained"]("alone")
    for found in said:
        for how in ("DDP", "FSDP2"):
            assert set(found[how]) - {"refused"} == set(alone)
            for name, state in alone.items():
                assert state.keys() == found[how][name].keys()
                for key, value in state.items():
                    torch.testing.assert_close(
                        torch.tensor(found[how][name][key]),
                        torch.tensor(value),
                        rtol=1e-3,
                        atol=1e-5,
                        msg=lambda text, where=(how, name, key): f"{where}: {text}",  # type: ignore[misc]
                    )
        assert "expected the same batches on every rank" in found["FSDP2"]["refused"]
    for name, state in alone.items():
        kept = "initial_weight" if name == "l2_to_initial" else "importance"
        assert any(key.endswith(f"2.bio_mod.{kept}") for key in state)
        assert torch.tensor(state[f"2.bio_mod.{kept}"]).abs().max() > 0
