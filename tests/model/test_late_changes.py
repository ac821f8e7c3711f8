"""Hooks that come after the capture: they run, or it is an error, and never nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx

KINDS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        return self.act(self.fc(x))


def noting(module: nn.Module, kind: str) -> list[str]:
    """Register a hook that takes down that it ran."""
    ran: list[str] = []

    def hook(*args: Any) -> None:
        ran.append(kind)

    getattr(module, kind)(hook)
    return ran


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["0", "0.fc"])
def test_a_hook_on_what_a_graph_has_inline_is_an_error(kind: str, path: str) -> None:
    bio_model, _ = biofx.transform(nn.Sequential(Block(), nn.Linear(4, 2)))
    x = torch.ones(2, 4)
    for model in (bio_model, copy.deepcopy(bio_model)):
        before = model(x)
        ran = noting(model.get_submodule(path), kind)
        with pytest.raises(
            biofx.errors.InputError, match=rf"module '{path}' .* would never run.*opaque=\['{path}'\]"
        ):
            model(x)
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            getattr(model.get_submodule(path), table).clear()
        torch.testing.assert_close(model(x), before)
        assert ran == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["", "0.act"])
def test_a_hook_on_what_a_graph_calls_runs(kind: str, path: str) -> None:
    bio_model, _ = biofx.transform(nn.Sequential(Block(), nn.Linear(4, 2)))
    ran = noting(bio_model.get_submodule(path), kind)
    bio_model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert ran == [kind]


def test_a_hook_registered_before_with_opaque_runs() -> None:
    model = nn.Sequential(Block(), nn.Linear(4, 2))
    ran = noting(model[0], "register_forward_hook")
    bio_model, _ = biofx.transform(model, opaque=["0"])
    bio_model(torch.ones(2, 4))
    assert ran == ["register_forward_hook"]


def test_a_result_has_the_full_name_of_its_class() -> None:
    made: type = type(biofx.capture(Block()))
    assert str(made) == str(Block)
    assert made is not Block
    # torch's own keep a name of ours: tracers take what is called torch.nn for one call
    assert type(biofx.capture(nn.Sequential(nn.Linear(2, 2)))).__module__.startswith("biofx")
