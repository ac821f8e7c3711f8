"""The callback of Lightning: the loop by hand to the bit, monitored, killed and resumed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.errors import BiofxWarning, InputError, PlasticityError
from tests.clients.runs import (
    EPOCHS,
    SCHEDULE,
    STEPS,
    STOP,
    InterruptedRunError,
    assert_equal_to_the_bit,
    batches,
    by_hand,
    data,
    dies_after,
    loss_of,
    made,
    optimizer_of,
)

lightning = pytest.importorskip("lightning")
integration = pytest.importorskip("biofx.integrations.lightning")


class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, **nets: nn.Module) -> None:
        super().__init__()
        self.bio_model = made()
        for name, net in nets.items():
            self.add_module(name, net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)

    def training_step(self, batch: Any, index: int) -> Tensor:
        # Lightning begins the epoch again if the loader has no state of its own: the step says which batch
        return loss_of(self.bio_model, batches()[self.trainer.global_step % STEPS])


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Any:
    options = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False, **options}
    return lightning.Trainer(
        default_root_dir=str(folder),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def loader() -> Any:
    return torch.utils.data.DataLoader(data(), batch_size=2)  # type: ignore[arg-type]


def saving(folder: Path) -> Any:
    return lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=3, save_top_k=-1
    )


def test_a_fit_is_the_loop_by_hand(tmp_path: Path) -> None:
    task, plasticity = Task(), integration.Plasticity(SCHEDULE)
    trainer = trainer_of(tmp_path, plasticity)
    assert plasticity.attachments == ()
    trainer.fit(task, loader())
    assert_equal_to_the_bit(task.bio_model, trainer.optimizers[0], plasticity.attachments)


@pytest.mark.parametrize("mid_epoch", [True, False])
def test_a_killed_fit_goes_on_from_the_trainers_checkpoint(tmp_path: Path, mid_epoch: bool) -> None:
    dying = integration.Plasticity(SCHEDULE, observers=[dies_after(STOP + 1)])
    with pytest.raises(InterruptedRunError):
        trainer_of(tmp_path, dying, saving(tmp_path), enable_checkpointing=True).fit(Task(), loader())
    saved = tmp_path / f"step={STOP if mid_epoch else STEPS}.ckpt"
    task, plasticity = Task(), integration.Plasticity(SCHEDULE)
    trainer = trainer_of(tmp_path, plasticity, max_epochs=-1, max_steps=EPOCHS * STEPS)
    trainer.fit(task, loader(), ckpt_path=str(saved), weights_only=True)
    assert_equal_to_the_bit(task.bio_model, trainer.optimizers[0], plasticity.attachments)


def test_a_checkpoint_of_another_schedule_is_refused_and_one_without_the_callback_is_told(
    tmp_path: Path,
) -> None:
    trainer_of(
        tmp_path, integration.Plasticity(["crystallize"]), saving(tmp_path), enable_checkpointing=True
    ).fit(Task(), loader())
    saved = str(tmp_path / f"step={STEPS}.ckpt")
    with pytest.raises(PlasticityError, match="expected a state of the same schedule"):
        trainer_of(tmp_path, integration.Plasticity()).fit(Task(), loader(), ckpt_path=saved)
    other = tmp_path / "plain"
    trainer_of(other, saving(other), enable_checkpointing=True).fit(Task(), loader())
    plasticity = integration.Plasticity(SCHEDULE)
    with pytest.warns(BiofxWarning, match="written without this callback"):
        trainer_of(tmp_path, plasticity).fit(Task(), loader(), ckpt_path=str(other / f"step={STEPS}.ckpt"))
    assert plasticity.attachments[0].steps == STEPS


def test_the_monitors_curves_go_to_the_trainers_loggers(tmp_path: Path) -> None:
    class Logger(lightning.pytorch.loggers.logger.Logger):  # type: ignore[misc, name-defined]
        name, version = "memory", 0

        def __init__(self) -> None:
            super().__init__()
            self.taken: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.taken.append((step, metrics))

        def log_hyperparams(self, *args: Any) -> None:
            pass

    logger, monitor, reference = Logger(), biofx.Monitor(every=4), biofx.Monitor(every=4)
    trainer = trainer_of(tmp_path, integration.Plasticity(SCHEDULE, monitor=monitor), logger=logger)
    trainer.fit(Task(), loader())
    by_hand(monitor=reference)
    assert [record.step for record in monitor.records] == [0, 4, 8]
    expected = [(record.step, biofx.diagnostics.curves(record)) for record in reference.records]
    assert [entry for entry in logger.taken if "factor mean/0.weight" in entry[1]] == expected
    quiet = Logger()
    unlogged = integration.Plasticity(SCHEDULE, monitor=biofx.Monitor(), log=False)
    trainer_of(tmp_path, unlogged, logger=quiet).fit(Task(), loader())
    assert not any("factor mean/0.weight" in values for _, values in quiet.taken)


def test_a_second_fit_attaches_to_its_own_optimizer(tmp_path: Path) -> None:
    task, plasticity = Task(), integration.Plasticity(SCHEDULE)
    trainer_of(tmp_path, plasticity).fit(task, loader())
    (first,) = plasticity.attachments
    trainer_of(tmp_path, plasticity).fit(task, loader())
    (second,) = plasticity.attachments
    assert second is not first
    assert second.steps == STEPS * EPOCHS
    assert "(detached)" in repr(first)


def test_the_ranks_of_a_distributed_fit_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper is the trainer's model, and its group that of the ranks."""
    group, given = object(), []
    plasticity = integration.Plasticity()
    monkeypatch.setattr(plasticity._run, "attach", lambda *args, group: given.append(group))
    for model in (SimpleNamespace(process_group=group), None):
        plasticity.on_train_start(SimpleNamespace(model=model, optimizers=[], loggers=[]), None)
    assert given == [group, None]


def test_what_cannot_be_attached_is_refused(tmp_path: Path) -> None:
    task: Any = Task()
    task.bio_model = nn.Linear(4, 2)
    with pytest.raises(InputError, match=r"found a Task without: give the trainer what biofx\.transform"):
        trainer_of(tmp_path, integration.Plasticity()).fit(task, loader())
    two = Task(other=made())
    with pytest.raises(InputError, match=r"found \['bio_model', 'other'\]; .* as model='bio_model'"):
        trainer_of(tmp_path, integration.Plasticity()).fit(two, loader())
    callbacks = [integration.Plasticity(SCHEDULE, model=name) for name in ("bio_model", "other")]
    assert callbacks[0].state_key != callbacks[1].state_key
    trainer_of(tmp_path, *callbacks).fit(two, loader())
    assert [callback.attachments[0].steps for callback in callbacks] == [STEPS * EPOCHS] * 2
