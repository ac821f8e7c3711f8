"""Layers of loralib, which merge their weights in train(): right in both modes, from either."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import CaptureError

loralib = pytest.importorskip("loralib")


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer: Any = loralib.Conv2d(3, 4, 3, r=2, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x).flatten(1)


MODELS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: loralib.Linear(6, 6, r=2, lora_alpha=4), lambda: torch.randn(3, 6)),
    "merged": (
        lambda: loralib.MergedLinear(6, 6, r=2, enable_lora=[True, False, True]),
        lambda: torch.randn(2, 3, 6),
    ),
    "convolution": (Convolves, lambda: torch.randn(2, 3, 5, 5)),
    "several": (
        lambda: nn.Sequential(
            loralib.Linear(6, 6, r=2), nn.ReLU(), loralib.Linear(6, 4, r=2, merge_weights=False)
        ),
        lambda: torch.randn(3, 6),
    ),
    "embedding": (
        lambda: nn.Sequential(loralib.Embedding(9, 6, r=2), nn.Linear(6, 2)),
        lambda: torch.arange(6),
    ),
}


def _model(name: str) -> tuple[Any, Tensor]:
    make, given = MODELS[name]
    model = make()
    for path, parameter in model.named_parameters():
        if "lora_" in path:
            nn.init.normal_(parameter)
    return model, given()


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_right_in_both_modes(name: str) -> None:
    for captured_in, recorded in itertools.product(("train", "eval"), (False, True)):
        model, x = _model(name)
        getattr(model, captured_in)()
        example: Any = ((x,), {}) if recorded else None
        made = biofx.transform(
            model, {"fuzzy_lr_distribution": "baseline"}, example_inputs=example
        ).graph_module
        for mode in ("eval", "train", "eval", "eval", "train"):
            for each in (model, made):
                getattr(each, mode)()
            assert torch.equal(made(x), model(x))
        model.eval()
        assert torch.equal(biofx.deploy(made)(x), model(x))


def test_merging_behind_the_back_of_the_mode_is_an_error() -> None:
    model, x = _model("linear")
    made: Any = biofx.transform(model, {"fuzzy_lr_distribution": "baseline"}).graph_module
    made.eval()  # which returns nothing
    made(x)
    made.merged = False
    with pytest.raises(CaptureError, match="'merged'"):
        made(x)
