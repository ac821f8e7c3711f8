from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biofx

HOSTILE = ["class", "None", 'quo"te', "back\\slash", "two\nlines", "\u200b", "ﬁ", '");exec(ran)#']


def named(name: str) -> nn.Module:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    return model


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_code_cannot_carry_is_refused(name: str) -> None:
    with pytest.raises(biofx.CaptureError, match=r"the model has something named .* cannot carry"):
        biofx.capture(named(name))
    buffer: Any = nn.Sequential(nn.Identity())
    buffer[0].register_buffer(name, torch.ones(1))
    with pytest.raises(biofx.CaptureError, match=r"has something named .* at '0"):
        biofx.capture(buffer)


@pytest.mark.parametrize(
    "name", ["0", "größe", "名前", "[bold]", "/etc/up", "x" * 300, "it's", "{x}", "a b", "%s"]
)
def test_an_odd_name_is_captured_as_it_is(name: str) -> None:
    model = named(name)
    bio_model, report = biofx.transform(model, {"fuzzy_lr_distribution": "normal"})
    assert name in str(report)
    x = torch.randn(3, 4)
    assert torch.equal(bio_model(x), model(x))
    assert f"{name}.weight" in bio_model.state_dict()
