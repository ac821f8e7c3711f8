"""What callbacks of all trainers share, without a trainer."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.errors import InputError, PlasticityError
from biofx.integrations.plastic_run import PlasticRun, transformed_in
from biofx.plasticity.agreement import Ranks

NAMES = ("lightning", "transformers", "skorch")


def made() -> biofx.BioGraphModule:
    return biofx.transform(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))).graph_module


def sgd(*models: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(3, 4)).square().mean().backward()
    optimizer.step()


class Task(nn.Module):
    def __init__(self, **nets: nn.Module) -> None:
        super().__init__()
        for name, net in nets.items():
            self.add_module(name, net)


def test_the_transformed_model_is_found_wherever_it_is() -> None:
    one, other = made(), made()
    assert transformed_in(one) is one
    assert transformed_in(torch.compile(one, backend="eager")) is one  # type: ignore[arg-type]
    assert transformed_in(Task(inner=Task(net=one))) is one
    assert transformed_in(Task(a=one, b=other), "b") is other
    with pytest.raises(InputError, match=r"model='c': expected .* one of \['a', 'b'\]"):
        transformed_in(Task(a=one, b=other), "c")
    with pytest.raises(InputError, match=r"found \['a', 'b'\]; give each a callback .* model='a'"):
        transformed_in(Task(a=one, b=other))


def test_each_optimizer_that_steps_the_model_is_attached_and_no_other() -> None:
    bio, head = made(), nn.Linear(2, 2)
    first, second = (torch.optim.SGD(bio.get_submodule(path).parameters(), lr=0.1) for path in ("0", "2"))
    run = PlasticRun("crystallize")
    run.attach(Task(net=bio, head=head), [sgd(head), first, second])
    assert [list(found.modes) for found in run.attachments] == [["0.weight"], ["2.weight"]]
    step(bio, first)
    assert [found.steps for found in run.attachments] == [1, 0]
    other, again = made(), PlasticRun("crystallize")
    again.load_state_dict(run.state_dict())
    with pytest.raises(PlasticityError, match=r"expected the state of 1 optimizers, .* found that of 2"):
        again.attach(other, [sgd(other)])
    with pytest.raises(PlasticityError, match="expected an optimizer of this model's weights"):
        PlasticRun().attach(made(), [sgd(head)])


def test_what_is_attached_stays_so_and_what_is_gone_is_let_go() -> None:
    bio = made()
    optimizer, run = sgd(bio), PlasticRun()
    run.attach(bio, [optimizer])
    before = run.attachments
    run.attach(bio, [optimizer])
    assert run.attachments == before
    following = sgd(bio)
    run.attach(bio, [following])
    assert "(detached)" in repr(before[0])
    step(bio, following)
    assert (before[0].steps, run.attachments[0].steps) == (0, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copied_run_finds_the_attachments_of_the_copied_optimizer(copied: Any) -> None:
    bio = made()
    optimizer, run = sgd(bio), PlasticRun("crystallize")
    run.attach(bio, [optimizer])
    step(bio, optimizer)
    twin, other, again = copied((bio, optimizer, run))
    assert again.attachments == ()
    again.attach(twin, [other])
    assert again.attachments[0].steps == 1
    step(twin, other)
    assert (again.attachments[0].steps, run.attachments[0].steps) == (2, 1)


def test_a_state_is_taken_at_once_or_when_training_starts() -> None:
    bio = made()
    optimizer, run = sgd(bio), PlasticRun("crystallize")
    assert run.state_dict() == {}
    run.attach(bio, [optimizer])
    step(bio, optimizer)
    saved = run.state_dict()
    for moment in ("before", "after", "resume"):
        twin, later = made(), PlasticRun("crystallize")
        if moment == "before":
            later.load_state_dict(saved)
        if moment == "resume":
            later.resume_from(saved)
        later.attach(twin, [sgd(twin)])
        if moment == "after":
            later.load_state_dict(saved)
        assert later.attachments[0].steps == 1, moment
    for wrong in ({"version": 2, "attachments": []}, {"version": 1}):
        with pytest.raises(PlasticityError, match="expected the plasticity of a trainer's run, version 1"):
            run.load_state_dict(wrong)
    run.load_state_dict({})  # of a run that had not begun
    assert run.attachments[0].steps == 1


def test_sharded_memory_is_not_saved_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    bio = made()
    run = PlasticRun("synaptic_scaling")
    optimizer = sgd(bio)
    run.attach(bio, [optimizer])
    step(bio, optimizer)
    monkeypatch.setattr("biofx.integrations.plastic_run.is_sharded", lambda tensor: True)
    with pytest.raises(PlasticityError, match=r"save with biofx\.checkpoints\.save_sharded"):
        run.state_dict()


def test_the_ranks_of_a_group_agree() -> None:
    bio, group = made(), object()
    run = PlasticRun()
    run.attach(bio, [sgd(bio)], group=group)
    assert run.attachments[0]._ranks == Ranks((group,))


def test_another_observer_is_no_monitor() -> None:
    with pytest.raises(InputError, match=r"monitor: expected a biofx.Monitor, found <.* observers=\["):
        PlasticRun(monitor=lambda step, layers: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_trainer_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (name, f"{name}.pytorch", "pytorch_lightning", f"{name}.callbacks"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"biofx.integrations.{name}", raising=False)
    module = importlib.import_module(f"biofx.integrations.{name}")
    try:
        with pytest.raises(InputError, match=f"needs the package {name}: pip install {name}"):
            module.Plasticity(["crystallize"])
    finally:
        sys.modules.pop(f"biofx.integrations.{name}")
