"""What ``tools/simulate`` works out is what four ranks hold and send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simulate.ranks import MECHANISMS, Mesh, collectives, kept_by, mechanisms_table, step_of, table
from simulate.transformers import SIZES, Transformer
from tests.two_ranks import run_on_ranks

ROOT = Path(__file__).parent.parent
SMALL = Transformer(blocks=2, width=16, hidden=32, heads=4, words=24)
RANKS = (
    f"""
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, {str(ROOT / "tools")!r})
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import biofx
from simulate.transformers import Transformer

dist.init_process_group("gloo")
torch.set_num_threads(1)
SMALL = {SMALL!r}
KINDS = {{"allgather": "gathered", "reduce_scatter": "scattered", "allreduce": "summed"}}
"""
    + """

class Counted(TorchDispatchMode):
    # bytes of what goes through collectives; those of parts of a layer are functional ones
    def __init__(self):
        super().__init__()
        self.found = {"gathered": 0, "scattered": 0, "summed": 0, "summed in parts": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        space, _, name = str(func).partition(".")
        if space == "_c10d_functional" and name.startswith("all_reduce"):
            self.found["summed in parts"] += args[0].nbytes
        if space == "c10d":
            plain = name.replace("_all", "all").replace("__", "_")
            kind = next((KINDS[key] for key in KINDS if key in plain), None)
            if kind is not None:
                largest = [t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
                self.found[kind] += sum(largest) if kind == "summed" else max(largest)
        return made


def bytes_of(tensors):
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


found = {}
for how in ("DDP", "FSDP2", "HSDP", "FSDP2 and TP"):
    torch.manual_seed(0)
    config = biofx.BioConfig(
        apply_dales_principle=True, weight_density=0.5, consolidation="synaptic-intelligence"
    )
    model, _ = biofx.transform(SMALL.make(), config)
    model.train()
    wrapped = model
    if how == "DDP":
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif how == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    elif how == "HSDP":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        colwise = dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel)
        plan = {**colwise, **dict.fromkeys(("out", "down"), RowwiseParallel)}
        plan = {f"blocks.{n}.{name}": style() for n in range(2) for name, style in plan.items()}
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, foreach=False)
    seed = dist.get_rank() // 2 if how == "FSDP2 and TP" else dist.get_rank()
    words = torch.randint(0, SMALL.words, (2, 5), generator=torch.Generator().manual_seed(seed))
    for step in range(2):  # what the first step alone does, as checks, is not counted
        with Counted() as counted:
            wrapped(words).square().mean().backward()
        if step == 0:
            wrapped.zero_grad()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    states = [state for state in model.modules() if isinstance(state, biofx.BioModule)]
    kept = {}
    for name, keys in {
        "rates": ["fuzzy_learning_rate_parameters"],
        "masks": ["connection_mask"],
        "synaptic intelligence": ["importance", "task_importance", "anchor_weight"],
    }.items():
        buffers = [state._buffers[key] for state in states if state.scaled_in_graph for key in keys]
        kept[name] = bytes_of([buffer for buffer in buffers if buffer is not None])
    gradients = [parameter.grad for parameter in parameters]
    found[how] = {"held": bytes_of([*parameters, *gradients, *moments]), "sent": counted.found, "kept": kept}
Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
time.sleep(1)
os._exit(0)
"""
)


def test_four_ranks_hold_and_send_what_the_formulas_say(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    errors = run_on_ranks(4, script, tmp_path)
    said: list[dict[str, Any]] = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("*.json"))
    ]
    assert len(said) == 4, errors
    for how, mesh in {
        "DDP": Mesh(replicas=4),
        "FSDP2": Mesh(shards=4),
        "HSDP": Mesh(replicas=2, shards=2),
        "FSDP2 and TP": Mesh(shards=2, parts=2),
    }.items():
        found = said[0][how]
        assert found["held"] == step_of(SMALL, mesh).held, how
        assert found["sent"] == collectives(SMALL, mesh, words=10), how
        for name, kept in found["kept"].items():
            assert kept == kept_by(MECHANISMS[name], SMALL.parameters(), mesh), (how, name)


def test_the_readme_has_the_tables() -> None:
    text = (ROOT / "tools" / "simulate" / "README.md").read_text(encoding="utf-8")
    for size in SIZES:
        assert table(size) in text
        assert mechanisms_table(size) in text
