"""Weights that torchao quantises after the transform."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import biofx

torchao: Any = pytest.importorskip("torchao.quantization")

INPUT = torch.linspace(-1, 1, 96).reshape(3, 32)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def quantised(model: nn.Module) -> nn.Module:
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def test_layers_that_the_graph_calls_are_quantised_as_in_the_plain_model() -> None:
    bio_model, _ = biofx.transform(net(), {"fuzzy_learning_rate_factor_nu": 0})
    torch.testing.assert_close(quantised(bio_model.eval())(INPUT), quantised(net())(INPUT))


@pytest.mark.parametrize("config", [{}, {"weight_splitting_Gamma": 2}, {"apply_dales_principle": True}])
def test_a_weight_that_something_is_done_to_is_refused_and_deployed_first(config: dict[str, Any]) -> None:
    bio_model, _ = biofx.transform(net(), config)
    deployed = biofx.deploy(bio_model)
    expected = copy.deepcopy(deployed)(INPUT)
    torch.testing.assert_close(quantised(deployed)(INPUT), expected, rtol=0, atol=0.02)
    with pytest.raises(biofx.CaptureError, match=r"'0\.weight' is a .* now.*biofx\.deploy"):
        quantised(bio_model)(INPUT)
