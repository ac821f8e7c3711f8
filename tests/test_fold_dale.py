"""Folding changes nothing where other mechanisms act on the same weights and normalisations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import biofx
from tests.dale_models import MODELS

EVERYTHING = biofx.BioConfig(
    weight_splitting_Gamma=2, apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0.2
)


def tried(bio: biofx.BioGraphModule, x: Tensor) -> dict[str, Tensor]:
    """Outputs in training and in evaluation, every gradient, and every buffer afterwards."""
    output = bio.train()(x)
    output.square().sum().backward()
    found = {f"gradient of {name}": p.grad for name, p in bio.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in bio.named_buffers()}
    return {"training": output.detach(), "evaluation": bio.eval()(x).detach(), **found}


@pytest.mark.parametrize("fields", [{}, {"dales_method": "expand"}], ids=["project", "expand"])
@pytest.mark.parametrize("name", MODELS)
def test_folded_equals_unfolded_with_every_mechanism_on(name: str, fields: dict[str, Any]) -> None:
    make, shape = MODELS[name]
    model = make().double()
    config = EVERYTHING.replace(**fields)
    x = torch.randn(shape, dtype=torch.float64)
    folded, report = biofx.transform(model, config)
    apart, _ = biofx.transform(model, config.replace(weight_splitting_fold=False))
    assert next(entry for entry in report.passes if entry.name == "fold-splits").applied > 0
    expected, found = tried(apart, x), tried(folded, x)
    assert expected.keys() == found.keys()
    for what, value in expected.items():
        torch.testing.assert_close(found[what], value, rtol=1e-12, atol=1e-12, msg=what)
    # with expand, units behind a split are left alone: where none is left, that is what is found
    faults = {fault.subject for fault in biofx.check(folded).faults}
    assert faults <= ({"expanded units", "signs"} if fields else set())
