from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from biofx.errors import PlasticityError
from biofx.plasticity.optimizers import decoupled_decay, has_decay, signature, without_decay


def test_schedules_do_not_change_the_signature_and_switches_do() -> None:
    group = {"lr": 0.1, "initial_lr": 0.1, "momentum": 0.85, "nesterov": False, "betas": (0.9, 0.999)}
    same: list[dict[str, Any]] = [
        {"lr": 1e-6},
        {"initial_lr": 3.0},
        {"momentum": 0.95},
        {"params": [1]},
        {"betas": (0.95, 0.99)},
    ]
    other: list[dict[str, Any]] = [
        {"momentum": 0.0},
        {"nesterov": True},
        {"betas": (0.0, 0.999)},
        {"eps": 1.0},
        {"momentum": -0.85},
    ]
    assert {signature({**group, **change}) for change in same} == {signature(group)}
    assert len({signature({**group, **change}) for change in other}) == len(other)
    assert signature({**group, "step": 7}, ["step"]) == signature(group)


@pytest.mark.parametrize("name", ["weight_decay", "lambd", "wd", "adamw_wd", "fixed_weight_decay"])
def test_decays_are_found_by_their_names(name: str) -> None:
    assert has_decay({"lr": 0.1, name: 0.1})
    assert not has_decay({"lr": 0.1, name: 0.0, "lr_decay": 0.1, "momentum_decay": 4e-3})
    assert without_decay({"params": [1], "lr": 0.1, name: 0.1}) == {"lr": 0.1, name: 0.0}


def test_decay_that_is_not_decoupled_cannot_act_freely() -> None:
    weight = nn.Parameter(torch.ones(1))
    adamw = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    assert decoupled_decay(adamw, adamw.param_groups[0]) == 0.1 * 0.5
    asgd = torch.optim.ASGD([weight], lambd=0.1)
    with pytest.raises(PlasticityError, match="ASGD mixes weight decay into the gradient"):
        decoupled_decay(asgd, asgd.param_groups[0])
