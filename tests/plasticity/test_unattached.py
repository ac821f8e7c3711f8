"""Stepping a transformed model by an optimizer that erases its factors, without ``attach``, warns once."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import biofx
from biofx.errors import BiofxWarning
from biofx.plasticity import unattached

ERASING: dict[str, Any] = {
    name: getattr(torch.optim, name)
    for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Rprop")
}


def made(**options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return biofx.transform(model, options)[0]


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 6)).square().mean().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", ERASING)
def test_the_first_step_warns_and_no_other(name: str) -> None:
    model = made()
    optimizer = ERASING[name](model.parameters(), lr=1e-3)
    state = torch.get_rng_state()
    with pytest.warns(BiofxWarning, match=f"^{name} steps a model .*biofx.attach") as caught:
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    step(model, optimizer)
    step(model, ERASING[name](model.parameters(), lr=1e-3))


def test_two_models_warn_each_and_groups_of_one_together() -> None:
    for _ in range(2):
        model = made()
        groups = [{"params": [parameter]} for parameter in model.parameters()]
        with pytest.warns(BiofxWarning, match="AdamW steps a model") as caught:
            step(model, torch.optim.AdamW(groups))
        assert len(caught) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}],
    ids=["plain", "momentum", "decay"],
)
def test_gradient_descent_does_not_warn(options: dict[str, Any]) -> None:
    model = made()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1, **options))


def test_what_is_attached_or_has_no_factors_does_not_warn() -> None:
    model = made()
    optimizer = torch.optim.Adam(model.parameters())
    biofx.attach(model, optimizer)
    step(model, optimizer)
    for other in (made(fuzzy_lr_distribution="baseline"), biofx.BioConverter()(nn.Linear(6, 3))):
        step(other, torch.optim.Adam(other.parameters()))
    levelled = made(fuzzy_lr_distribution="baseline", weight_splitting_Gamma=2, weight_splitting_rates="mean")
    with pytest.warns(BiofxWarning, match="have no effect"):
        step(levelled, torch.optim.Adam(levelled.parameters()))


def test_averages_and_copies_that_are_not_stepped_do_not_warn() -> None:
    model = made()
    averaged, copied = AveragedModel(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    averaged.update_parameters(model)
    assert copied(torch.ones(2, 6)).isfinite().all()
    other = nn.Linear(6, 3)
    step(other, torch.optim.Adam(other.parameters()))


def test_an_optimizer_that_needs_a_closure_does_not_warn() -> None:
    model = made()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(5, 6)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0


def test_the_hook_is_there_once_and_rests_when_all_have_been_stepped() -> None:
    gc.collect()
    for weight in list(unattached._WATCHED.keys()):
        unattached._WATCHED.pop(weight)
    model, late = made(), made()
    assert len(unattached._HOOKS) == 1
    optimizer = torch.optim.SGD([*model.parameters()], lr=0.1)
    step(model, optimizer)
    assert len(unattached._WATCHED) == 2  # the other model's
    optimizer.add_param_group({"params": list(late.parameters())})
    optimizer.step()
    assert not len(unattached._WATCHED)
    forgotten = made()
    assert len(unattached._WATCHED) == 2
    del forgotten
    gc.collect()
    assert not len(unattached._WATCHED)


def test_a_warning_that_is_an_error_stops_one_step_alone() -> None:
    model = made()
    optimizer = torch.optim.Adam(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BiofxWarning, match="have no effect"):
            step(model, optimizer)
        step(model, optimizer)
