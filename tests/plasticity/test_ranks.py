from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.plasticity import BioModule
from biofx.plasticity.agreement import Ranks
from biofx.plasticity.ranks import (
    average_activity,
    parts_not_called,
    ranks_to_agree_with,
    refuse_parts_alone,
    shard_state,
    whole,
)
from tests.two_ranks import run_on_two_ranks

RUN = """
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import biofx


def say(words):
    Path(sys.argv[1], f"rank{dist.get_rank()}.txt").write_text(words)
    # leave at once: taking a process group down as the interpreter ends may abort, which is not the question
    time.sleep(1)
    os._exit(0)


dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
config = biofx.BioConfig(
    weight_splitting_Gamma=2,
    apply_dales_principle=True,
    fuzzy_lr_distribution=biofx.Distribution.ACTIVITY,
    fuzzy_lr_dynamic=True,
)
bio_model, _ = biofx.transform(model, config)
torch.manual_seed(100 + dist.get_rank())
wrapped = nn.parallel.DistributedDataParallel(bio_model)
optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
rules = ["crystallize", biofx.Rule("rejuvenate_weights", every=5), "volume_dependent_lr", "synaptic_scaling"]
try:
    biofx.attach(bio_model, optimizer, rules)
except biofx.errors.PlasticityError:
    pass
else:
    say("the bare model was not refused")
biofx.attach(wrapped, optimizer, rules)
start = bio_model.get_parameter("0.weight").detach().clone()
for _ in range(12):
    optimizer.zero_grad()
    wrapped(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
differing = ["everything"] if torch.equal(start, bio_model.get_parameter("0.weight")) else []
for name, tensor in bio_model.state_dict().items():
    copies = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(copies, tensor.contiguous())
    if not torch.equal(*copies):
        differing.append(name)
say(f"differing: {differing}")
"""


def test_replicas_with_every_rule_on_stay_equal_to_the_bit(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN, encoding="utf-8")
    errors = run_on_two_ranks(script, tmp_path)
    said = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("rank*.txt"))]
    assert said == ["differing: []"] * 2, errors


def test_one_process_agrees_with_itself(mlp: nn.Module) -> None:
    config = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.ACTIVITY, fuzzy_lr_dynamic=True)
    bio_model, _ = biofx.transform(mlp, config)
    bio_model(torch.randn(5, 4))
    states = [module for module in bio_model.modules() if isinstance(module, biofx.BioModule)]
    assert all(state.follows_activity for state in states)
    assert ranks_to_agree_with(bio_model, states) is None
    (activity,) = (state.activity for state in states if state.path == "0.weight")
    assert activity is not None
    before = activity.clone()
    for state in states:
        average_activity(state, None)
    assert torch.equal(activity, before)


def test_rank_that_has_seen_nothing_has_no_say(mlp: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    config = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.ACTIVITY, fuzzy_lr_dynamic=True)
    bio_model, _ = biofx.transform(mlp, config)
    (state,) = (m for m in bio_model.modules() if isinstance(m, biofx.BioModule) and m.path == "0.weight")
    assert state.activity is not None
    others = {"nothing": torch.full_like(state.activity, -1.0), "two": torch.full_like(state.activity, 2.0)}

    def agreed(own: float, *ranks: str) -> torch.Tensor:
        def all_reduce(sums: torch.Tensor, group: object) -> None:
            for rank in ranks:
                seen = (others[rank] >= 0).float()
                sums += torch.stack([others[rank] * seen, seen])

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        assert state.activity is not None
        state.activity.fill_(own)
        average_activity(state, Ranks((object(),)))
        return state.activity.clone()

    assert (agreed(4.0, "two") == 3.0).all()
    assert (agreed(4.0, "nothing") == 4.0).all()
    assert (agreed(-1.0, "two", "nothing") == 2.0).all()
    assert (agreed(-1.0, "nothing") == -1.0).all()


def shard_by_itself(module: Any) -> None:
    """Make a module look as ``fully_shard`` makes it look."""
    module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {"unshard": lambda self: None})


class Choosing(nn.Module):
    """Stays in Python, and calls its part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if float(x.sum()) > 0 else x


def test_parts_that_a_graph_has_taken_apart_are_not_called() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    model = nn.Sequential(block, nn.Linear(4, 4), nn.Linear(4, 4), Choosing())
    bio_model: Any = biofx.transform(model, exclude="1").graph_module
    assert "3" in bio_model.graph_breaks
    for path in ("0", "0.1", "1", "2", "3", "3.part", "3.part.0"):
        shard_by_itself(bio_model.get_submodule(path))
    # the graph reads the layers of 0 and 2, and calls 1 and 3; Python calls what is in 3
    assert [path for path, _ in parts_not_called(bio_model)] == ["0", "0.1", "2"]
    with pytest.raises(biofx.errors.PlasticityError, match=r"found only parts of it sharded, as '0'"):
        refuse_parts_alone(bio_model)
    shard_by_itself(bio_model)
    refuse_parts_alone(bio_model)


def test_a_whole_layer_is_left_as_it_is() -> None:
    layer = nn.Linear(2, 2)
    state = BioModule(layer)
    weight = layer.weight
    with whole(state):
        assert layer.weight is weight
    assert layer.weight is weight
    shard_state(state)
    assert state.stored_factors is None
