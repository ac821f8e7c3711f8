"""Loops with Accelerate: the loop by hand to the bit, killed and resumed, gradients accumulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.errors import InputError, PlasticityError
from tests.clients.runs import (
    EPOCHS,
    SCHEDULE,
    STEPS,
    STOP,
    InterruptedRunError,
    assert_equal_to_the_bit,
    batches,
    dies_after,
    loss_of,
    made,
    optimizer_of,
)

accelerate = pytest.importorskip("accelerate")
integration = pytest.importorskip("biofx.integrations.accelerate")


def run(
    folder: Path, first: int = 0, *, schedule: Any = SCHEDULE, observers: Any = (), save: bool = True
) -> Any:
    """Train as with Accelerate, from the checkpoint of a step, and save after each third step."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = made()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    monitor = biofx.Monitor(every=4)
    plasticity = integration.attach(
        accelerator, model, optimizer, schedule, monitor=monitor, observers=observers
    )
    if first:
        accelerator.load_state(str(folder / str(first)))
    for step in range(first, STEPS * EPOCHS):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batches()[step % STEPS]))
        optimizer.step()
        if save and step % 3 == 2:
            accelerator.save_state(str(folder / str(step + 1)))
    return accelerator.unwrap_model(model), optimizer, plasticity, monitor


def test_a_loop_is_the_loop_by_hand(tmp_path: Path) -> None:
    model, optimizer, plasticity, monitor = run(tmp_path, save=False)
    assert_equal_to_the_bit(model, optimizer, plasticity.attachments)
    assert [record.step for record in monitor.records] == [0, 4, 8]


def test_a_killed_loop_goes_on_from_the_accelerators_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        run(tmp_path, observers=[dies_after(STOP + 1)])
    model, optimizer, plasticity, _ = run(tmp_path, STOP)
    assert_equal_to_the_bit(model, optimizer, plasticity.attachments)
    with pytest.raises(PlasticityError, match="expected a state of the same schedule"):
        run(tmp_path, STOP, schedule=["crystallize"])


def test_a_step_is_one_of_the_optimizer() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = made()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    plasticity = integration.attach(accelerator, model, [optimizer], SCHEDULE)
    for batch in batches():
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    assert plasticity.attachments[0].steps == STEPS // 3


def test_what_is_no_accelerator_or_not_transformed_is_refused() -> None:
    model = made()
    with pytest.raises(InputError, match=r"expected an accelerate.Accelerator, found a AdamW"):
        integration.attach(optimizer_of(model), model, optimizer_of(model))
    linear = nn.Linear(4, 2)
    with pytest.raises(InputError, match="found a Linear without: give the trainer"):
        integration.attach(
            accelerate.Accelerator(cpu=True), linear, torch.optim.SGD(linear.parameters(), lr=0.1)
        )
