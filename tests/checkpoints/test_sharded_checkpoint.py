"""What fails on one rank fails on all, and none of them is changed or left waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from biofx.checkpoints.sharded_checkpoint import on_all_ranks

RANKS = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import biofx
from torch import nn

folder = Path(sys.argv[1])


class Picky(torch.optim.SGD):
    def load_state_dict(self, state):
        super().load_state_dict(state)
        if dist.get_rank() == 1:
            raise ValueError("not here")

    def state_dict(self):
        if getattr(self, "hides", False):
            raise ValueError("no state here")
        return super().state_dict()


def made(seed):
    torch.manual_seed(seed)
    model = biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))).graph_module
    return model, Picky(model.parameters(), lr=0.1 * (1 + seed))


def values(model):
    return {key: value.tolist() for key, value in model.state_dict().items()}


def told(call):
    try:
        call()
    except biofx.errors.CheckpointError as error:
        return str(error)
    return "nothing was raised"


def work(rank):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    found = {}
    model, optimizer = made(0)
    biofx.checkpoints.save_sharded(model, folder / "kept", optimizer=optimizer)
    target, own = made(1)
    before = values(target)
    found["load"] = told(lambda: biofx.checkpoints.load_sharded(folder / "kept", target, optimizer=own))
    found["unchanged"] = values(target) == before and own.param_groups[0]["lr"] == 0.2
    own.hides = rank == 1
    found["save"] = told(lambda: biofx.checkpoints.save_sharded(target, folder / "kept", optimizer=own))
    if rank == 1:
        torch.save = lambda *args, **options: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    own.hides = False
    found["full"] = told(lambda: biofx.checkpoints.save_sharded(target, folder / "kept", optimizer=own))
    found["folder"] = told(lambda: biofx.checkpoints.load_sharded(folder / "missing", target))
    fresh, _ = made(2)
    biofx.checkpoints.load_sharded(folder / "kept", fresh)
    found["kept"] = values(fresh) == values(model)
    found["files"] = len(list((folder / "kept").iterdir()))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


children = []
for rank in range(2):
    child = os.fork()
    if child == 0:
        work(rank)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_what_fails_on_one_rank_fails_on_both(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    said = [tmp_path / f"{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in said), done.stderr[-3000:]
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in said)
    assert "rank 1 of 2 failed: " in first["load"]
    assert "a Picky that raises: ValueError: not here" in first["load"]
    assert "rank 1 of 2 failed" in first["save"]
    for found in (first, second):
        assert "ValueError: not here" in found["load"]
        assert "ValueError: no state here" in found["save"]
        assert "No space left on device" in found["full"]
        assert "expected a folder that biofx.checkpoints.save_sharded wrote" in found["folder"]
        assert found["unchanged"]
        assert found["kept"]
        assert found["files"] == 3  # an index and a part of each rank


def test_without_other_ranks_a_step_is_a_step() -> None:
    assert on_all_ranks(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        on_all_ranks(lambda: 1 // 0)
