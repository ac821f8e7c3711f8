from __future__ import annotations

from typing import Any

import pytest
import torch

import biofx
from biofx.errors import PlasticityError
from tests.plasticity.runs import fresh


class Outer:
    """What some libraries put around an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


def test_unknown_wrapper_is_refused_with_what_to_attach_to() -> None:
    bio = fresh()
    optimizer = torch.optim.AdamW(bio.parameters())
    with pytest.raises(
        PlasticityError, match=r"found a Outer around it; attach to optimizer.optimizer, the AdamW"
    ):
        biofx.attach(bio, Outer(optimizer))  # type: ignore[arg-type]
    assert biofx.attach(bio, optimizer).modes["0.weight"] == "update"


def test_wrapper_that_trains_copies_is_refused() -> None:
    bio = fresh()
    copies = [parameter.detach().clone().requires_grad_() for parameter in bio.parameters()]
    with pytest.raises(PlasticityError, match="it trains copies, which factors cannot reach"):
        biofx.attach(bio, Outer(torch.optim.SGD(copies, lr=0.1)))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, 3, torch.optim.AdamW, []])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(PlasticityError, match=r"expected an optimizer of torch\.optim's kind, found"):
        biofx.attach(fresh(), wrong)
