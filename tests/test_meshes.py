"""Four ranks in meshes of two dimensions: hybrid sharding, tensor parallel, and both with one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.two_ranks import run_on_ranks

COMMON = """
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import biofx

FOLDER = Path(sys.argv[1])
DISTRIBUTED = "RANK" in os.environ
if DISTRIBUTED:
    dist.init_process_group("gloo")
RANK = dist.get_rank() if DISTRIBUTED else 0
torch.set_num_threads(1)
PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}
RULES = ["crystallize", "volume_dependent_lr", "synaptic_scaling", biofx.Rule("rejuvenate_weights", every=2)]
RULES.append(biofx.Rule("shrink_and_perturb", every=2))
FOLLOWING = {"fuzzy_lr_dynamic": True, "fuzzy_lr_distribution": "weight_adaptive"}
GROWN = {"weight_density": 0.5, "rejuvenation_growth": "gradient"}
UNITS = {"unit_turnover": "continual-backprop", "unit_turnover_rate": 0.1, "unit_turnover_maturity": 1}
UNITS |= {"fuzzy_lr_dynamic": True, "fuzzy_lr_distribution": "activity"}
UPGD = {"consolidation": "upgd", "upgd_noise": 0.1, "upgd_utility_decay": 0.5}
RUNS = {  # options, optimizer, rules, and the meshes on which they run
    "rules": (FOLLOWING, "AdamW", RULES, ("HSDP", "TP", "FSDP2 and TP")),
    "grown": (GROWN, "SGD", RULES[3:], ("HSDP", "TP", "FSDP2 and TP")),
    "seed": ({"fuzzy_lr_dtype": "seed"}, "SGD", [], ("FSDP2 and TP",)),
    "neurons": ({"fuzzy_lr_granularity": "neuron"}, "SGD", ["crystallize"], ("TP",)),
    "units": (UNITS, "SGD", ["rejuvenate_units"], ("HSDP",)),
    "upgd": (UPGD, "AdamW", ["upgd"], ("FSDP2 and TP",)),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        # 15 units do not fall into equal parts
        self.first, self.up, self.down = nn.Linear(8, 15), nn.Linear(15, 20), nn.Linear(20, 16)
        self.norm, self.last = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.up(torch.relu(self.first(x))))
        return self.last(torch.relu(self.norm(self.down(x))))


def transformed(options):
    torch.manual_seed(0)
    # each rank's own gradient has other signs than the mean over the ranks, which is projected
    config = biofx.BioConfig(apply_dales_principle=True, dales_method="project")
    return biofx.transform(Net(), config.replace(fuzzy_learning_rate_factor_nu=0.3, **options))[0]


def spread(model, how):
    mesh = None
    if how == "HSDP":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if how == "FSDP2":
        mesh = init_device_mesh("cpu", (4,))
    if how == "TP":
        mesh_of_parts = init_device_mesh("cpu", (4,))
        parallelize_module(model, mesh_of_parts, {name: style() for name, style in PLAN.items()})
    if how == "FSDP2 and TP":
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, both["tensor"], {name: style() for name, style in PLAN.items()})
        mesh = both["data"]
    return model if mesh is None else fully_shard(model, mesh=mesh)


def batch(step, how):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    parts = {"HSDP": (4, RANK), "FSDP2 and TP": (2, RANK // 2)}
    count, own = parts.get(how, (1, 0))
    return x.chunk(count)[own]


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def state_of(model):
    return {key: whole(value).tolist() for key, value in model.state_dict().items()}


def trained(name, how, resume=False):
    options, stepping, rules, _ = RUNS[name]
    model = spread(transformed(options), how)
    steps = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 1e-2}}[stepping]
    optimizer = getattr(torch.optim, stepping)(model.parameters(), **steps)
    plasticity = biofx.attach(model, optimizer, rules)
    folder = FOLDER / f"{name} {how}"
    start = 0
    if resume:
        start = 2
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        biofx.checkpoints.load_sharded(FOLDER / resume, model, optimizer=optimizer, plasticity=plasticity)
    gradients = None
    for step in range(start, 4):
        optimizer.zero_grad()
        model(batch(step, how)).square().mean().backward()
        if gradients is None:
            gradients = {key: whole(parameter.grad).tolist() for key, parameter in model.named_parameters()}
        optimizer.step()
        if step == 1 and name == "rules":
            biofx.checkpoints.save_sharded(model, folder, optimizer=optimizer, plasticity=plasticity)
    return {"gradients": gradients, "state": state_of(model)}


def held_by(optimizer):
    return [whole(moment) for state in optimizer.state.values() for moment in state.values()]


def ruled(how):
    # several blocks of random numbers, which do not end where the parts of ranks do
    torch.manual_seed(0)
    # (they fill registers, behind which kernels of torch round in another way)
    net = nn.Sequential(nn.Linear(608, 704), nn.ReLU(), nn.Linear(704, 4))
    config = biofx.BioConfig(apply_dales_principle=True, rejuvenation_turnover=0.02)
    model = spread(biofx.transform(net, config)[0], how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rules = ["volume_dependent_lr", "synaptic_scaling", "shrink_and_perturb", "rejuvenate_weights"]
    plasticity = biofx.attach(model, optimizer, [biofx.Rule(rule, after=1) for rule in rules])
    with CommDebugMode() as traffic:
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().clone()
            optimizer.step()
    counts = {str(key): count for key, count in traffic.get_comm_counts().items()}
    values = [whole(value) for key, value in model.state_dict().items() if "_extra" not in key]
    sums = [hash_of(value) for value in (*values, *held_by(optimizer))]
    state = model.get_submodule("0.bio_mod")
    return {"sums": sums, "counts": counts, "targets": hash_of(state.target_strength)}


def hash_of(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
"""

RANKS = """
found = {"errors": {}, "bytes": {}}
for name, (_, _, _, meshes) in RUNS.items():
    for how in meshes:
        found[f"{name} {how}"] = trained(name, how)
for how in ("HSDP", "FSDP2 and TP"):
    found[f"resumed {how}"] = trained("rules", how, resume="rules HSDP")
found["ruled"] = {how: ruled(how) for how in ("HSDP", "FSDP2")}
for how in ("HSDP", "TP", "FSDP2 and TP"):
    model = spread(transformed({"weight_density": 0.5}), how)
    model(batch(0, how))
    states = {key: module for key, module in model.named_modules() if isinstance(module, biofx.BioModule)}
    for name in ("fuzzy_learning_rate_parameters", "connection_mask"):
        held = [states[f"{layer}.bio_mod"].get_buffer(name).to_local() for layer in ("up", "down")]
        found["bytes"].setdefault(how, []).append([part.untyped_storage().nbytes() for part in held])
REFUSED = {
    "activity": {"fuzzy_lr_distribution": "activity", "fuzzy_lr_dynamic": True},
    "units": {"unit_turnover": "continual-backprop"},
    "splits": {"weight_splitting_Gamma": 2},
    "pairs": {"dales_method": "expand"},
}
for what, options in REFUSED.items():
    for when in ("forward", "attach") if what == "splits" else ("attach",):
        model = spread(transformed(options), "TP")
        before = [value.clone() for value in map(whole, model.state_dict().values())]
        try:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(batch(0, "TP")) if when == "forward" else biofx.attach(model, optimizer)
        except biofx.BiofxError as error:
            found["errors"][f"{what} {when}"] = str(error)
        assert all(map(torch.equal, before, map(whole, model.state_dict().values())))
(FOLDER / f"{RANK}.json").write_text(json.dumps(found))
# leave at once: taking a process group down as the interpreter ends may abort, which is not the question
time.sleep(1)
os._exit(0)
"""


def close(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    for kind in ("gradients", "state"):
        assert found[kind].keys() == expected[kind].keys(), where
        for key, value in expected[kind].items():
            torch.testing.assert_close(
                torch.tensor(found[kind][key]),
                torch.tensor(value),
                rtol=1e-4,
                atol=1e-5,
                msg=lambda text, place=f"{where}, {kind} of {key}": f"{place}: {text}",  # type: ignore[misc]
            )


def test_four_ranks_in_two_dimensions_train_as_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(COMMON + RANKS, encoding="utf-8")
    errors = run_on_ranks(4, script, tmp_path)
    said = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("*.json"))]
    assert len(said) == 4, errors
    first = said[0]
    for other in said[1:]:
        assert {**other, "bytes": 0} == {**first, "bytes": 0}
    monkeypatch.setattr(sys, "argv", ["ranks.py", str(tmp_path)])
    here: dict[str, Any] = {}
    exec(COMMON, here)
    for name, (_, _, _, meshes) in here["RUNS"].items():
        alone = here["trained"](name, "")
        for how in meshes:
            close(first[f"{name} {how}"], alone, f"{name} {how}")
    # what four ranks of one mesh saved, those of the others, and one process, go on from
    going_on = here["trained"]("rules", "", resume="rules HSDP")
    for how in ("HSDP", "FSDP2 and TP"):
        close(first[f"resumed {how}"], going_on, f"resumed {how}")
    # rules that need not gather a weight do to the bit what one process does
    for how, ruled in first["ruled"].items():
        one = here["ruled"]("")
        assert ruled["sums"] == one["sums"], how
        assert ruled["targets"] == one["targets"], how
        assert not any("gather" in name for name in ruled["counts"]), ruled["counts"]
        assert any("alltoall" in name for name in ruled["counts"]), ruled["counts"]
    # each has factors and masks of its part alone: of (20, 15) and (16, 20), whole in each of two replicas
    for kind in (0, 1):
        total = {how: sum(rank["bytes"][how][kind][0] for rank in said) for how in first["bytes"]}
        assert total == {"HSDP": 2 * 4 * 20 * 15, "TP": 4 * 20 * 15, "FSDP2 and TP": 4 * 20 * 15}
        assert first["bytes"]["TP"][kind] == [4 * 5 * 15, 4 * 16 * 5]
    found = first["errors"]
    for what, words in {
        "activity": "follow the activity of units",
        "units": "turned over by activity",
        "splits": "sums groups of channels",
        "pairs": "its units are pairs",
    }.items():
        for when in ("forward", "attach") if what == "splits" else ("attach",):
            assert words in found[f"{what} {when}"], found
            assert "computed in parts by several ranks" in found[f"{what} {when}"]
