"""The callback of the Trainer of transformers: the loop by hand to the bit, killed and resumed."""

from __future__ import annotations

import json
import shutil
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
    assert_same,
    data,
    dies_after,
    made,
    optimizer_of,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
integration = pytest.importorskip("biofx.integrations.transformers")


class WithLoss(nn.Module):
    """A transformed model, and the loss that a Trainer asks of the module that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.bio_model = made()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.bio_model(x)
        return {"loss": nn.functional.cross_entropy(output, labels), "output": output}


class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(folder: Path, model: nn.Module, *callbacks: Any, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_grad_norm=0,
        logging_strategy="no",
        **options,
    )
    optimizer = optimizer_of(model)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"x": x, "labels": y} for x, y in data()],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        callbacks=list(callbacks),
    )


def test_training_is_the_loop_by_hand(tmp_path: Path) -> None:
    model, plasticity = WithLoss(), integration.Plasticity(SCHEDULE, monitor=biofx.Monitor(every=4))
    trainer = trainer_of(tmp_path, model, plasticity)
    trainer.train()
    assert_equal_to_the_bit(model.bio_model, trainer.optimizer, plasticity.attachments)
    assert [record.step for record in plasticity._run.monitor.records] == [0, 4, 8]


def test_killed_training_goes_on_from_the_trainers_checkpoint(tmp_path: Path) -> None:
    dying = integration.Plasticity(SCHEDULE, observers=[dies_after(STOP + 1)])
    with pytest.raises(InterruptedRunError):
        trainer_of(tmp_path, WithLoss(), dying).train()
    model, plasticity = WithLoss(), integration.Plasticity(SCHEDULE)
    trainer = trainer_of(tmp_path, model, plasticity)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS * EPOCHS
    assert_equal_to_the_bit(model.bio_model, trainer.optimizer, plasticity.attachments)
    elsewhere = shutil.copytree(tmp_path / f"checkpoint-{STOP}", tmp_path / "elsewhere" / "moved")
    trainer.train(resume_from_checkpoint=str(elsewhere))  # the same objects once more
    assert_equal_to_the_bit(model.bio_model, trainer.optimizer, plasticity.attachments)


def test_another_schedule_and_a_checkpoint_without_the_callback(tmp_path: Path) -> None:
    trainer_of(tmp_path, WithLoss(), integration.Plasticity(["crystallize"])).train()
    saved = tmp_path / f"checkpoint-{STOP}"
    with pytest.raises(PlasticityError, match="expected a state of the same schedule"):
        trainer_of(tmp_path, WithLoss(), integration.Plasticity()).train(resume_from_checkpoint=str(saved))
    state = json.loads((saved / "trainer_state.json").read_text(encoding="utf-8"))
    del state["stateful_callbacks"]["Plasticity"]
    (saved / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    plasticity = integration.Plasticity(SCHEDULE)
    with pytest.warns(BiofxWarning, match="written without this callback"):
        trainer_of(tmp_path, WithLoss(), plasticity).train(resume_from_checkpoint=str(saved))
    assert plasticity.attachments[0].steps == STEPS * EPOCHS - STOP


def test_two_models_have_a_callback_each(tmp_path: Path) -> None:
    class Two(WithLoss):
        def __init__(self) -> None:
            super().__init__()
            self.other = made()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            output = super().forward(x, labels)
            return {**output, "loss": output["loss"] + self.other(x).square().mean()}

    with pytest.raises(InputError, match=r"found \['bio_model', 'other'\]"):
        trainer_of(tmp_path, Two(), integration.Plasticity()).train()

    def callbacks(*observers: Any) -> list[Any]:
        names = {"bio_model": SCHEDULE, "other": ["crystallize"]}
        return [
            integration.Plasticity(rules, model=name, observers=observers) for name, rules in names.items()
        ]

    with pytest.raises(InterruptedRunError):
        trainer_of(tmp_path, Two(), *callbacks(dies_after(STOP + 1))).train()
    model, resumed = Two(), callbacks()
    trainer_of(tmp_path, model, *resumed).train(resume_from_checkpoint=True)
    expected, others = Two(), callbacks()
    trainer_of(tmp_path / "other", expected, *others).train()
    assert_same(expected.state_dict(), model.state_dict(), "model")
    for one, other in zip(others, resumed, strict=True):
        assert_same(one.attachments[0].state_dict(), other.attachments[0].state_dict(), "plasticity")


def test_what_would_lose_the_options_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, WithLoss(), integration.Plasticity(), restore_callback_states_from_checkpoint=True
    )
    with pytest.raises(InputError, match="restore_callback_states_from_checkpoint=False"):
        trainer.train()
    with pytest.raises(InputError, match="found a Linear without: give the trainer"):
        trainer_of(tmp_path, nn.Linear(4, 2), integration.Plasticity()).train()


def test_the_ranks_of_a_distributed_run_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback is shown no wrapper: the group of all ranks stands for that of the wrapper."""
    group = object()
    two_ranks = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        group=SimpleNamespace(WORLD=group),
    )
    monkeypatch.setattr(integration, "distributed", two_ranks)
    given: list[Any] = []
    plasticity = integration.Plasticity()
    monkeypatch.setattr(plasticity._run, "attach", lambda *args, group: given.append(group))
    arguments = transformers.TrainingArguments(output_dir="unused", report_to=[], use_cpu=True)
    plasticity.on_train_begin(
        arguments, transformers.TrainerState(), None, model=nn.Linear(1, 1), optimizer=None
    )
    assert given == [group]
