"""Units of all layers in one run, against each layer by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx.plasticity.model_states import bio_modules


def net() -> nn.Module:
    torch.manual_seed(0)
    wide = (
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, 9),
        nn.Tanh(),
        nn.Linear(9, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )
    return nn.Sequential(*wide).double()


@pytest.mark.parametrize(
    "options",
    [
        {"unit_turnover": "continual-backprop", "unit_turnover_rate": 0.05, "unit_turnover_maturity": 3},
        {"unit_turnover": "redo", "unit_turnover_dormancy": 0.3},
    ],
)
def test_layers_together_are_each_layer_by_itself(options: dict[str, Any]) -> None:
    together = biofx.transform(net(), {"fuzzy_lr_distribution": "baseline", **options}).graph_module.train()
    alone = copy.deepcopy(together)
    stepping, other = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (together, alone))
    plasticity = biofx.attach(together, stepping, ["rejuvenate_units"])
    replaced = []
    plasticity._observers.append(
        lambda _, layers: replaced.append(
            [layer.touched.get("rejuvenate_units", 0) for layer in layers.values()]
        )
    )
    by_hand = []
    for step in range(30):
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((together, stepping), (alone, other)):
            optimizer.zero_grad()
            F.mse_loss(model(x), x[:, :3]).backward()
            optimizer.step()
        by_hand.append(
            [
                0 if state.why_not("rejuvenate_units") else state.rejuvenate_units(other)
                for state in bio_modules(alone).values()
            ]
        )
    assert replaced == by_hand
    assert len({tuple(counts) for counts in replaced}) > 2  # none, and of different layers
    for name, held in alone.state_dict().items():
        assert torch.equal(together.state_dict()[name], held), name
