"""A training step in bfloat16, with everything on, comes near the one in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, Distribution, Rule

EVERYTHING: Mapping[str, Any] = {
    "weight_splitting_Gamma": 2,
    "apply_dales_principle": True,
    "weight_density": 0.5,
    "fuzzy_lr_distribution": Distribution.LOGNORMAL,
}
CASES: dict[str, tuple[Mapping[str, Any], list[str]]] = {
    "mechanisms": (EVERYTHING, []),
    "projected signs": ({**EVERYTHING, "dales_method": "project"}, []),
    "rules on gradients": (EVERYTHING, ["crystallize", "volume_dependent_lr"]),
    "rules on weights": (EVERYTHING, ["synaptic_scaling", "shrink_and_perturb"]),
    "upgd": ({"consolidation": "upgd", "upgd_noise": 0.01}, ["upgd"]),
    "l2_to_initial": ({"l2_to_initial_strength": 0.1}, ["l2_to_initial"]),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()),
        *(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)),
    )


def update(case: str, dtype: torch.dtype, *, autocast: bool) -> dict[str, Tensor]:
    """Return what one step adds to each weight, in float32."""
    config, rules = CASES[case]
    bio, _ = biofx.transform(net(), BioConfig(**config))
    # the same start in both types of number
    with torch.no_grad():
        for parameter in bio.parameters():
            parameter.copy_(parameter.bfloat16())
    bio.to(dtype)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.5)
    biofx.attach(bio, optimizer, [Rule(name) for name in rules])
    before = {name: parameter.detach().clone() for name, parameter in bio.named_parameters()}
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = bio(x if autocast else x.to(dtype)).float().square().mean()
    loss.backward()
    optimizer.step()
    assert {parameter.dtype for parameter in bio.parameters()} == {dtype}
    return {name: (p.detach().float() - before[name].float()) for name, p in bio.named_parameters()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "model in bfloat16"])
def test_a_step_in_bfloat16_comes_near_the_one_in_float32(case: str, autocast: bool) -> None:
    expected = update(case, torch.float32, autocast=False)
    found = update(case, torch.float32 if autocast else torch.bfloat16, autocast=autocast)
    for name, moved in expected.items():
        distance = float((found[name] - moved).norm())
        # 8 bits of each number, in a backward of four layers; without factors it would be 0.16 and more;
        # weights of about 0.3 are rounded by 0.001
        allowed = 0.1 * float(moved.norm()) + (0.0 if autocast else 0.001 * moved.numel() ** 0.5)
        assert distance <= allowed, (name, distance, float(moved.norm()))
    assert max(float(moved.norm()) for moved in expected.values()) > 0.02
