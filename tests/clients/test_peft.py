"""Adapters of PEFT that are put on a model after the transform."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx

peft: Any = pytest.importorskip("peft")

TOKENS = torch.arange(35).reshape(5, 7) % 10
LAYERS = ["embedding", "conv", "hidden", "out"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(10, 4), nn.Conv1d(4, 6, 3, padding=1)
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.conv(self.embedding(x).transpose(1, 2))).mean(-1)
        return self.out(torch.relu(self.hidden(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def with_lora(model: nn.Module, *layers: str) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=list(layers), r=2, init_lora_weights=False)
    )


@pytest.mark.parametrize("layers", [[layer] for layer in LAYERS] + [LAYERS])
def test_lora_acts_as_on_the_plain_model(layers: list[str]) -> None:
    bio_model, _ = biofx.transform(net())
    before = bio_model(TOKENS)
    plain, found = with_lora(net(), *layers), with_lora(bio_model, *layers)
    torch.testing.assert_close(found(TOKENS), plain(TOKENS))
    assert not torch.allclose(found(TOKENS), before)
    with found.disable_adapter():
        torch.testing.assert_close(found(TOKENS), before, rtol=0, atol=0)
    for model in (plain, found):
        model(TOKENS).square().sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients
    for name, parameter in found.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])
    for again in (copy.deepcopy(found), biofx.deploy(bio_model)):
        torch.testing.assert_close(again(TOKENS), plain(TOKENS))
    torch.testing.assert_close(pickle.loads(pickle.dumps(bio_model))(TOKENS), plain(TOKENS))
    merged = found.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS), plain.merge_and_unload()(TOKENS))


@pytest.mark.parametrize("config", [{"apply_dales_principle": True}, {"weight_splitting_fold": False}])
def test_layers_with_lora_keep_signs_and_splits(config: dict[str, Any]) -> None:
    bio_model, _ = biofx.transform(
        net(), {"weight_splitting_Gamma": 2, "weight_splitting_fold": False} | config
    )
    before = bio_model(TOKENS)
    found = with_lora(bio_model, *LAYERS)
    assert not torch.allclose(found(TOKENS), before)
    with found.disable_adapter():
        torch.testing.assert_close(found(TOKENS), before, rtol=0, atol=0)
    torch.testing.assert_close(biofx.deploy(bio_model)(TOKENS), found(TOKENS))


def test_a_rate_of_zero_still_freezes_a_base_layer_that_is_trained() -> None:
    bio_model, _ = biofx.transform(net())
    bio_model.hidden.bio_mod.fuzzy_learning_rate_parameters.zero_()
    found = with_lora(bio_model, "hidden")
    weight = found.base_model.model.hidden.base_layer.weight.requires_grad_()
    found(TOKENS).sum().backward()
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight))


def test_folded_layers_are_refused_by_name_and_the_remedies_work() -> None:
    config = {"weight_splitting_Gamma": 2}
    bio_model, _ = biofx.transform(net(), config)
    deployed = biofx.deploy(bio_model)
    with pytest.raises(biofx.CaptureError, match=r"'hidden'.*lora.*before biofx.transform.*deploy"):
        with_lora(bio_model, "hidden")(TOKENS)
    before = deployed(TOKENS)
    adapted = with_lora(deployed, "hidden")
    assert not torch.allclose(adapted(TOKENS), before)
    first = with_lora(net(), "hidden").base_model.model
    expected = first(TOKENS)
    transformed, _ = biofx.transform(first, {"fuzzy_learning_rate_factor_nu": 0.1})
    torch.testing.assert_close(transformed(TOKENS), expected)
