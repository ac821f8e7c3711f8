"""Two ranks of one run on this machine; they write what they found to files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
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
from torch.distributed.tensor.debug import CommDebugMode

import biofx

FOLDER = Path(sys.argv[1])
RULES = ["crystallize", "volume_dependent_lr", "synaptic_scaling", biofx.Rule("rejuvenate_weights", every=3)]
RULES.append(biofx.Rule("shrink_and_perturb", every=2))
DISTRIBUTED = "RANK" in os.environ
if DISTRIBUTED:
    dist.init_process_group("gloo")
RANK = dist.get_rank() if DISTRIBUTED else 0
torch.set_num_threads(1)


def net():
    # 15 units do not fall into equal parts
    layers = [nn.Linear(8, 15), nn.ReLU(), nn.Linear(15, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 4))


RUNS = {
    "SGD": ("SGD", "uniform", 1.0),
    "AdamW": ("AdamW", "activity", 1.0),
    "masked": ("AdamW", "weight_adaptive", 0.5),
    "grown": ("SGD", "uniform", 0.5, "gradient"),
    "useful": ("SGD", "uniform", 1.0, "random", "gradient"),
    "lowest": ("SGD", "uniform", 1.0, "random", "gradient", "proportion"),
    "weakest": ("SGD", "uniform", 1.0, "random", "magnitude", "proportion"),
}


def transformed(kind="uniform", density=1.0, growth="random", utility="magnitude", selection="probability"):
    torch.manual_seed(0)
    # "project" looks at the signs of the mean over the ranks, not at those of a rank's own gradient
    options = {"dales_method": "project", "fuzzy_lr_distribution": kind, "fuzzy_lr_dynamic": True}
    config = biofx.BioConfig(apply_dales_principle=True, weight_density=density, **options)
    config = config.replace(rejuvenation_growth=growth, rejuvenation_utility=utility)
    if utility == "gradient":
        config = config.replace(rejuvenation_redraw="initial")
    if selection != "probability":
        config = config.replace(rejuvenation_selection=selection, rejuvenation_turnover=0.103, fuzzy_lr_min=0)
    model = biofx.transform(net(), config.override("4", weight_splitting_Gamma=2))[0]
    if selection != "probability":  # some synapses stay
        model.get_submodule("2").bio_mod.fuzzy_learning_rate_parameters[:, ::3] = 0
    return model


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def state_of(model):
    return {key: whole(value).tolist() for key, value in model.state_dict().items()}


def batch(step):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    return x.chunk(2)[RANK] if DISTRIBUTED and dist.get_world_size() == 2 else x


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def optimizer_of(model, name):
    options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 1e-2}}[name]
    return getattr(torch.optim, name)(model.parameters(), **options)


FOLLOWING = {"fuzzy_lr_distribution": "weight_adaptive", "fuzzy_lr_dynamic": True}
KINDS = {
    "halves": {"fuzzy_lr_dtype": "bfloat16"},
    "neurons": {**FOLLOWING, "fuzzy_lr_granularity": "neuron"},
    "layers": {**FOLLOWING, "fuzzy_lr_granularity": "layer"},
    "following": FOLLOWING,
    "evolving": {"fuzzy_lr_distribution": "temporal", "fuzzy_lr_dynamic": True},
}


def blocks():
    first, second = nn.Sequential(nn.Linear(8, 15), nn.ReLU()), nn.Sequential(nn.Linear(15, 16), nn.ReLU())
    return nn.Sequential(first, second, nn.Sequential(nn.Linear(16, 15), nn.Tanh()), nn.Linear(15, 4))


def accumulated():
    # several backwards to a step, gradients shared at each or at the last alone; then clipping
    found = {}
    for name, options in KINDS.items():
        torch.manual_seed(0)
        options = {"fuzzy_learning_rate_factor_nu": 0.3, "fuzzy_lr_min": 0, **options}
        config = biofx.BioConfig(apply_dales_principle=True, dales_method="abs", **options)
        model, _ = biofx.transform(blocks(), config, exclude=() if name == "halves" else "3")
        if DISTRIBUTED:
            if name in ("halves", "following"):  # the graph has taken the blocks apart, and calls the readout
                for part in ("0", "1", "2.0", "3"):
                    fully_shard(model.get_submodule(part))
            fully_shard(model, reshard_after_forward=name == "following")
        optimizer = optimizer_of(model, "SGD")
        if name != "halves":
            biofx.attach(model, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(3):
                if DISTRIBUTED and step:
                    model.set_requires_gradient_sync(part != 1)
                model(batch(3 * step + part)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        found[name] = state_of(model)
        assert biofx.check(model).ok
    return found


def trained():
    found = {}
    for name, (stepping, *options) in RUNS.items():
        model = transformed(*options)
        if DISTRIBUTED:
            torch.manual_seed(100 + RANK)
            fully_shard(model)
        optimizer = optimizer_of(model, stepping)
        attachment = biofx.attach(model, optimizer, RULES)
        train(model, optimizer, range(4))
        folder = FOLDER / name
        if DISTRIBUTED:
            extra = {"step": 4}
            save = biofx.checkpoints.save_sharded
            save(model, folder, optimizer=optimizer, plasticity=attachment, extra=extra)
        saved = state_of(model)
        train(model, optimizer, range(4, 8))
        found[name] = {"saved": saved, "after": state_of(model)}
    return found


def resumed(sharded):
    found = {}
    for name, (stepping, *options) in RUNS.items():
        model = transformed(*options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        if sharded:
            fully_shard(model)
        wrapped = nn.parallel.DistributedDataParallel(model) if DISTRIBUTED and not sharded else model
        optimizer = optimizer_of(wrapped, stepping)
        attachment = biofx.attach(wrapped, optimizer, RULES)
        folder = FOLDER / name
        extra = biofx.checkpoints.load_sharded(folder, wrapped, optimizer=optimizer, plasticity=attachment)
        saved = state_of(model)
        train(wrapped, optimizer, range(extra["step"], 8))
        found[name] = {"saved": saved, "after": state_of(model)}
    return found
"""

RANKS = """
found = {"trained": trained(), "sharded": resumed(True), "DDP": resumed(False), "errors": {}}
found["accumulated"] = accumulated()
if DISTRIBUTED:
    # what a step asks of the other ranks, when no rule that needs the whole weight is due
    counts = []
    for rules in (None, [], ["crystallize"]):
        bio = rules is not None  # temporal factors change at every step
        model = transformed("temporal") if bio else net()
        fully_shard(model)
        optimizer = optimizer_of(model, "AdamW")
        if bio:
            rare = biofx.Rule("rejuvenate_weights", every=100, after=50)
            biofx.attach(model, optimizer, [*rules, rare])
        train(model, optimizer, [0])
        with CommDebugMode() as traffic:
            train(model, optimizer, [1])
        counts.append({str(key): value for key, value in traffic.get_comm_counts().items()})
    found["traffic"] = counts
    states = [module for module in model.modules() if isinstance(module, biofx.BioModule)]
    for buffers in ([state.stored_factors.to_local() for state in states], [state.sign for state in states]):
        found.setdefault("bytes", []).extend(
            buffer.untyped_storage().nbytes() for buffer in buffers if buffer is not None
        )
    alone = transformed()
    fully_shard(alone.get_submodule("2"))
    for what, call in {
        "forward of a part": lambda: alone(batch(0)),
        "attach to a part": lambda: biofx.attach(alone, optimizer_of(alone, "SGD")),
    }.items():
        try:
            call()
        except biofx.errors.PlasticityError as error:
            found["errors"][what] = str(error)
    sharded = net()
    fully_shard(sharded)
    wrapped = nn.parallel.DistributedDataParallel(net())
    for what, model in {"FSDP2": sharded, "DDP": wrapped}.items():
        try:
            biofx.transform(model)
        except biofx.errors.InputError as error:
            found["errors"][f"transform of {what}"] = str(error)
    model = transformed()
    fully_shard(model)
    biofx.save(transformed(), FOLDER / f"whole{RANK}.pt")
    calls = {
        "save": lambda: biofx.save(model, FOLDER / "x.pt"),
        "load": lambda: biofx.load(FOLDER / f"whole{RANK}.pt", model),
        "deploy": lambda: biofx.deploy(model),
    }
    for what, call in calls.items():
        try:
            call()
        except biofx.BiofxError as error:
            found["errors"][what] = str(error)
(FOLDER / f"{RANK}.json").write_text(json.dumps(found))
# leave at once: taking a process group down as the interpreter ends may abort, which is not the question
time.sleep(1)
os._exit(0)
"""


def launch(folder: Path) -> list[Any]:
    """Run two ranks and return what each of them said."""
    script = folder / "ranks.py"
    script.write_text(COMMON + RANKS, encoding="utf-8")
    errors = run_on_two_ranks(script, folder)
    said = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.json"))]
    assert len(said) == 2, errors
    return [json.loads(text) for text in said]


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), rtol=1e-4, atol=1e-5)


def test_two_ranks_train_as_one_process_does_and_what_they_save_any_number_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = launch(tmp_path)
    for what in set(first) - {"bytes"}:
        assert first[what] == second[what], what
    monkeypatch.setattr(sys, "argv", ["ranks.py", str(tmp_path)])
    here: dict[str, Any] = {}
    exec(COMMON, here)
    alone = here["trained"]()
    resumed = here["resumed"](False)
    assert set(alone) == set(here["RUNS"])
    for name, sharded in first["trained"].items():
        # sharded or not, the same but for the order in which the ranks' gradients are added
        close(sharded["saved"], alone[name]["saved"])
        close(sharded["after"], alone[name]["after"])
        assert sharded["saved"] != sharded["after"]
        # the same number of ranks goes on to the bit, another number, or DDP, as closely as above
        assert first["sharded"][name] == sharded
        for other in (first["DDP"][name], resumed[name]):
            assert other["saved"] == sharded["saved"]
            close(other["after"], sharded["after"])
    plain, bio, crystallizing = first["traffic"]
    assert plain == bio
    summed = {name: count for name, count in crystallizing.items() if "allreduce" not in name}
    assert summed == plain  # sums of one number each are all that is added
    expected = here["accumulated"]()
    assert set(first["accumulated"]) == set(expected) == set(here["KINDS"])
    for name, found in first["accumulated"].items():
        close(found, expected[name])
    # each rank has the factors of its own rows: 8 and 7, 8 and 8, 8 and 8, 2 and 2; signs are whole
    rows = ([8, 8, 8, 2], [7, 8, 8, 2])
    for rank, counts in zip((first, second), rows, strict=True):
        factors = [4 * count * width for count, width in zip(counts, (8, 15, 16, 16), strict=True)]
        assert rank["bytes"] == [*factors, 4 * 15, 4 * 16, 4 * 16]
    errors = first["errors"]
    assert "fully_shard(bio_model)" in errors["forward of a part"]
    assert "found only parts of it sharded, as '2'" in errors["attach to a part"]
    assert "shard the result instead: fully_shard(bio_model)" in errors["transform of FSDP2"]
    assert "wrap the result instead" in errors["transform of DDP"]
    assert "biofx.checkpoints.save_sharded" in errors["save"]
    assert "load before fully_shard" in errors["load"]
    assert "expected whole parameters" in errors["deploy"]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def test_a_folder_of_one_process_and_what_does_not_fit(tmp_path: Path) -> None:
    config = biofx.BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)

    def run() -> tuple[Any, Any, Any]:
        bio_model, _ = biofx.transform(net(), config)
        optimizer = torch.optim.AdamW(bio_model.parameters(), lr=1e-2)
        return bio_model, optimizer, biofx.attach(bio_model, optimizer, ["rejuvenate_weights"])

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    bio_model, optimizer, plasticity = run()
    train(bio_model, optimizer, torch.randn(8, 8))
    biofx.checkpoints.save_sharded(
        bio_model, tmp_path, optimizer=optimizer, plasticity=plasticity, extra={"a": [1, (2, "b")]}
    )
    other, other_optimizer, other_plasticity = run()
    options = {"optimizer": other_optimizer, "plasticity": other_plasticity}
    assert biofx.checkpoints.load_sharded(tmp_path, other, **options) == {"a": [1, (2, "b")]}
    x = torch.randn(8, 8)
    train(bio_model, optimizer, x)
    train(other, other_optimizer, x)
    for key, value in bio_model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(
        biofx.errors.CheckpointError, match=r"expected a folder that biofx\.checkpoints\.save_sharded"
    ):
        biofx.checkpoints.load_sharded(tmp_path / "missing", other, **options)
    narrow, _ = biofx.transform(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)), config)
    with pytest.raises(biofx.errors.CheckpointError, match="the checkpoint is of a Sequential"):
        biofx.checkpoints.load_sharded(tmp_path, narrow)
    next(tmp_path.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(
        biofx.errors.CheckpointError, match=r"expected a folder that biofx\.checkpoints\.save_sharded"
    ):
        biofx.checkpoints.load_sharded(tmp_path, other, **options)
    for key, value in other.state_dict().items():
        assert torch.equal(before[key], value), key
