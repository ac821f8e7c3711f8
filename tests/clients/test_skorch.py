"""The callback of skorch: the loop by hand to the bit, killed and resumed, cloned and pickled."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.errors import InputError
from tests.clients.runs import (
    EPOCHS,
    SCHEDULE,
    STEPS,
    STOP,
    InterruptedRunError,
    assert_equal_to_the_bit,
    batches,
    dies_after,
    made,
    optimizer_of,
)

skorch = pytest.importorskip("skorch")
integration = pytest.importorskip("biofx.integrations.skorch")


def net_of(*callbacks: Any, module: Any = made, epochs: int = EPOCHS) -> Any:
    return skorch.NeuralNet(
        module,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=0.02,
        optimizer__weight_decay=0.1,
        max_epochs=epochs,
        batch_size=2,
        train_split=None,
        callbacks=list(callbacks),
        callbacks__print_log=None,
    )


def samples() -> tuple[Any, Any]:
    pairs = batches()
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def saving(folder: Path) -> Any:
    return skorch.callbacks.Checkpoint(dirname=str(folder), monitor=None, f_plasticity="plasticity.pt")


@pytest.mark.parametrize("module", ["made by the net", "given"])
def test_a_fit_is_the_loop_by_hand(module: str) -> None:
    monitor = biofx.Monitor(every=4)
    net = net_of(
        integration.Plasticity(SCHEDULE, monitor=monitor), module=made() if module == "given" else made
    )
    net.fit(*samples())
    assert_equal_to_the_bit(net.module_, net.optimizer_, net.plasticity_.attachments)
    assert [record.step for record in monitor.records] == [0, 4, 8]


def test_a_killed_fit_goes_on_from_the_nets_checkpoint(tmp_path: Path) -> None:
    """skorch saves at the end of an epoch."""
    dying = integration.Plasticity(SCHEDULE, observers=[dies_after(STOP)])
    with pytest.raises(InterruptedRunError):
        net_of(dying, saving(tmp_path)).fit(*samples())
    checkpoint = saving(tmp_path)
    loads = skorch.callbacks.LoadInitState(checkpoint)
    net = net_of(integration.Plasticity(SCHEDULE), checkpoint, loads, epochs=1)
    net.fit(*samples())
    assert len(net.history) == EPOCHS
    assert_equal_to_the_bit(net.module_, net.optimizer_, net.plasticity_.attachments)


def test_a_net_goes_on_after_a_partial_fit_and_after_a_pickle() -> None:
    net = net_of(integration.Plasticity(SCHEDULE), epochs=1)
    net.fit(*samples())
    twin = pickle.loads(pickle.dumps(net))
    assert twin.plasticity_.attachments == ()
    for each in (net, twin):
        each.partial_fit(*samples())
        assert_equal_to_the_bit(each.module_, each.optimizer_, each.plasticity_.attachments)


def test_a_clone_begins_anew() -> None:
    base = pytest.importorskip("sklearn.base")
    net = net_of(integration.Plasticity(SCHEDULE))
    net.fit(*samples())
    twin = base.clone(net)
    twin.fit(*samples())
    assert_equal_to_the_bit(twin.module_, twin.optimizer_, twin.plasticity_.attachments)
    net.fit(*samples())  # makes module and optimizer anew
    assert_equal_to_the_bit(net.module_, net.optimizer_, net.plasticity_.attachments)


def test_what_loads_before_the_callback_is_told_what_is_missing(tmp_path: Path) -> None:
    checkpoint = saving(tmp_path)
    net_of(integration.Plasticity(SCHEDULE), checkpoint).fit(*samples())
    wrong = net_of(skorch.callbacks.LoadInitState(checkpoint), integration.Plasticity(SCHEDULE))
    with pytest.raises(AttributeError, match=r"net.plasticity_"):
        wrong.fit(*samples())
    with pytest.raises(InputError, match="found a Linear without: give the trainer"):
        net_of(integration.Plasticity(), module=lambda: nn.Linear(4, 2)).fit(*samples())
    assert optimizer_of(made()).param_groups[0]["lr"] == net_of().lr
    assert STEPS * EPOCHS > STOP > STEPS
