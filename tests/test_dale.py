"""Dale's principle through training, for every kind of network it is promised for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.operators.sign_ops import constrain_sign
from tests.dale_models import MODELS

CONFIG = biofx.BioConfig(apply_dales_principle=True, rejuvenation_parameter_dre=8.0)
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


AGREEING: dict[str, list[tuple[str, ...]]] = {
    "perceptron": [],
    "residual CNN": [
        ("blocks.0.conv1.weight", "blocks.1.conv1.weight", "blocks.1.around.0.weight"),
        ("blocks.2.conv1.weight", "fc1.weight"),
    ],
    "dense block": [
        ("squeezes.0.weight", "squeezes.1.weight"),
        ("squeezes.1.weight", "squeezes.2.weight"),
        ("squeezes.2.weight", "transition.weight"),
    ],
    "grouped and depthwise": [("squeeze.weight", "hidden.weight")],
    "transposed (U-Net)": [("down.weight", "join.weight")],
    "GRU": [("gru.weight_hh_l0", "gru.weight_ih_l1"), ("gru.weight_hh_l1", "hidden.weight")],
    "transformer": [("layer.self_attn.in_proj_weight", "layer.linear1.weight", "hidden.weight")],
}
"""Weights that read the same units, told by hand; where one reads more, the common ones come first."""
FLATTENED = AGREEING["grouped and depthwise"][0]
"""The second of these reads a run of entries from each unit."""


class Reader(torch.fx.Interpreter):
    """Runs a graph and keeps what its constraints give out, by the path of the parameter."""

    def __init__(self, bio: biofx.BioGraphModule) -> None:
        super().__init__(bio)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is constrain_sign:
            assert isinstance(n.args[0], torch.fx.Node)
            self.seen[str(n.args[0].target)] = result.detach()
        return result


def unit_signs(path: str, weight: Tensor, bio: biofx.BioGraphModule) -> Tensor:
    """The sign of each presynaptic unit, read off the effective weight; fails if a unit has two.

    A unit with no synapse left says 0.
    """
    owner: Any = bio.get_submodule(path.rpartition(".")[0])
    if path.endswith("in_proj_weight"):
        weight = weight[-len(weight) // 3 :]  # queries and keys are free
    if isinstance(owner, nn.ConvTranspose2d):
        table = weight.flatten(1)
    else:
        groups = getattr(owner, "groups", 1)
        per_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        table = per_group.transpose(1, 2).reshape(groups * weight.shape[1], -1)
    high, low = table.amax(1).clamp(min=0), table.amin(1).clamp(max=0)
    assert not ((high > 0) & (low < 0)).any(), path
    return high.sign() + low.sign()


def assert_one_sign_per_unit(bio: biofx.BioGraphModule, name: str, x: Tensor) -> None:
    """Read the weights that a forward uses, and find each unit's sign in all of them."""
    reader = Reader(copy.deepcopy(bio))
    reader.run(x)
    weights = {path: weight for path, weight in reader.seen.items() if weight.dim() > 1}
    signs = {path: unit_signs(path, weight, bio) for path, weight in weights.items()}
    assert all((gain >= 0).all() for gain in reader.seen.values() if gain.dim() == 1)
    for paths in AGREEING[name]:
        first = signs[paths[0]]
        for other in (signs[path] for path in paths[1:]):
            told = other[: len(first)]
            if paths == FLATTENED:
                told = other.reshape(len(first), -1).sum(1).sign()
            assert (first * told >= 0).all(), paths
            assert (first * told > 0).any(), paths


def wrong_signs(bio: biofx.BioGraphModule) -> int:
    """How many parameters have the other sign than their unit, before the graph puts them right."""
    states = [module for module in bio.modules() if isinstance(module, biofx.BioModule)]
    return sum(int((state.weight * state.signs() < 0).sum()) for state in states if state.is_constrained)


class Counts:
    """Counts the synapses that rejuvenation replaces."""

    def __init__(self) -> None:
        self.replaced = 0

    def __call__(self, step: int, layers: Any) -> None:
        self.replaced += sum(layer.touched.get("rejuvenate_weights", 0) for layer in layers.values())


@pytest.mark.parametrize(("optimizer", "steps"), [("SGD", 200), ("momentum", 200), ("AdamW", 500)])
@pytest.mark.parametrize("name", MODELS)
def test_no_violation_after_any_step(name: str, optimizer: str, steps: int) -> None:
    make, shape = MODELS[name]
    bio, report = biofx.transform(make(), CONFIG)
    signed = {
        remark.layer
        for entry in report.passes
        for remark in entry.remarks
        if remark.details.get("excitatory")
    }
    assert len(signed) > 1
    training = OPTIMIZERS[optimizer](bio.parameters())
    counts = Counts()
    biofx.attach(bio, training, [biofx.Rule("rejuvenate_weights", every=5)], observers=[counts])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    target = torch.randn(bio(x).shape, generator=generator)
    for step in range(steps):
        training.zero_grad()
        loss = (bio(x) - target).square().mean()
        loss.backward()
        training.step()
        assert loss.isfinite()
        assert wrong_signs(bio) == 0, step
        if step % 100 == 99:
            assert_one_sign_per_unit(bio, name, x)
    assert counts.replaced > 100
    assert biofx.check(bio).ok
