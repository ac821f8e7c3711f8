"""A run of plasticity written by hand, with which those of trainers are compared to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import biofx
from biofx.plasticity.attachment import Attachment

STEPS, EPOCHS = 6, 2
"""Batches of an epoch, and epochs."""
STOP = 9
"""Steps after which a run is interrupted, in the middle of the second epoch."""
SCHEDULE: Any = [
    "crystallize",
    "synaptic_scaling",
    biofx.Rule("rejuvenate_weights", every=4, after=1),
    biofx.Rule("update_fuzzy_learning_rates", every=2),
]


def made() -> biofx.BioGraphModule:
    """Return a transformed model with signs, rates that change by themselves and a layer without any."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    config = (
        biofx.BioConfig(apply_dales_principle=True)
        .override("2", fuzzy_lr_distribution="temporal", fuzzy_lr_update_freq=3, fuzzy_lr_dynamic=True)
        .override("4", fuzzy_lr_distribution="baseline", crystal_thresh=0.05)
    )
    return biofx.transform(model, config).graph_module


def data() -> list[tuple[Tensor, Tensor]]:
    """Return the samples of an epoch: inputs ``(4,)`` and classes, two for each batch."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2 * STEPS, 4, generator=generator)
    return [(x, (x.sum() > 0).long()) for x in inputs]


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return the batches of an epoch: inputs ``(2, 4)`` and classes ``(2,)``."""
    samples = data()
    pairs = zip(samples[::2], samples[1::2], strict=True)
    return [(torch.stack([a[0], b[0]]), torch.stack([a[1], b[1]])) for a, b in pairs]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch, a scalar."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of all runs."""
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def by_hand(
    steps: int = STEPS * EPOCHS, *, monitor: biofx.Monitor | None = None
) -> tuple[biofx.BioGraphModule, torch.optim.Optimizer, Attachment]:
    """Train in a loop without a trainer, for a number of steps."""
    model = made()
    optimizer = optimizer_of(model)
    plasticity = biofx.attach(model, optimizer, SCHEDULE, observers=[monitor] if monitor else [])
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batches()[step % STEPS]).backward()
        optimizer.step()
    return model, optimizer, plasticity


def assert_equal_to_the_bit(
    model: nn.Module, optimizer: Any, plasticity: Iterable[Attachment], steps: int = STEPS * EPOCHS
) -> None:
    """Weights, rates, counters, moments and the memory of rules are those of the loop by hand."""
    expected, other, attached = by_hand(steps)
    (found,) = plasticity
    assert found.steps == steps
    assert_same(expected.state_dict(), model.state_dict(), "model")
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"], "optimizer")
    assert_same(attached.state_dict(), found.state_dict(), "plasticity")
    memory = attached.state_dict()["memory"]
    assert memory["4.weight"]["dampening"] is not None, "nothing as large as a weight is remembered"


def assert_same(expected: Any, found: Any, place: str) -> None:
    """Two nested values are equal, tensors to the bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(expected, found), place
    elif isinstance(expected, Mapping):
        assert list(expected) == list(found), place
        for key, value in expected.items():
            assert_same(value, found[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(found), place
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert_same(one, other, f"{place}[{number}]")
    else:
        assert expected == found, place


class InterruptedRunError(Exception):
    """A run dies."""


def dies_after(steps: int) -> Callable[[int, Any], None]:
    """Return an observer with which a run dies in the step of that number, as a kill would have it die."""

    def observer(step: int, layers: Any) -> None:
        if step >= steps:
            raise InterruptedRunError

    return observer
