"""The distributed run of the page on several ranks, as the page says to run it."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

import biofx

ROOT = Path(__file__).parent.parent


def block_and_command() -> tuple[str, str]:
    page = (ROOT / "tools" / "docs" / "pages" / "howto" / "several_ranks.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(# train\.py\n.*?)```\n\n```sh\n(torchrun .*?)\n```", page, re.DOTALL)
    assert found
    return found[1], found[2]


def on_two_ranks(folder: Path) -> Path:
    """Run the block with the command and return what it saved."""
    block, command = block_and_command()
    (folder / "train.py").write_text(block, encoding="utf-8")
    words = command.split()
    assert words[0] == "torchrun"  # the name under which torch installs this module
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":  # the ranks talk over the loopback interface, whatever the machine's name is
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    # whether ranks can leave their process group without a quarrel is not the question
    assert (folder / "checkpoint" / ".metadata").exists(), done.stderr
    return folder / "checkpoint"


def in_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the block here, without sharding, and return what it knows in the end."""
    block, _ = block_and_command()
    alone = functools.partial(torch.distributed.init_process_group, store=HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(torch.distributed, "init_process_group", alone)
    monkeypatch.chdir(folder)
    known: dict[str, Any] = {}
    exec(re.sub(r"\nfully_shard\(.*", "", block), known)
    return known


def test_the_page_s_run_on_two_ranks_equals_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = on_two_ranks(tmp_path)
    parts = [re.fullmatch(r"__(\d)_[0-9a-f]{8}_0\.distcp", path.name) for path in checkpoint.glob("*.distcp")]
    assert sorted(part[1] for part in parts if part) == ["0", "1"]
    (tmp_path / "alone").mkdir()
    alone = in_one_process(tmp_path / "alone", monkeypatch)
    config = biofx.BioConfig(apply_dales_principle=True, dales_method="abs")  # as the block has it
    fresh, _ = biofx.transform(alone["net"], config)
    optimizer = torch.optim.AdamW(fresh.parameters())
    plasticity = biofx.attach(fresh, optimizer, alone["rules"])
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    biofx.checkpoints.load_sharded(checkpoint, fresh, optimizer=optimizer, plasticity=plasticity)
    assert plasticity.steps == 10
    found, expected = fresh.state_dict(), alone["bio_model"].state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    for key in ("2.weight", "2.bio_mod.fuzzy_learning_rate_parameters"):
        assert not torch.allclose(before[key], found[key])
    for one, other in zip(alone["optimizer"].state.values(), optimizer.state.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
