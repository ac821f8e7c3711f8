"""Plasticity in the Trainer of transformers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed

from biofx.diagnostics.monitor import Monitor
from biofx.errors import InputError
from biofx.integrations.plastic_run import PlasticRun, missing
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.optimizer_step import Observer
from biofx.plasticity.rule import Rule

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    TrainerCallback, ExportableState = missing("transformers", error), object

_SAVED, _MODEL = "saved", "model"


class Plasticity(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Runs a model's plasticity in a ``transformers.Trainer``: attaches, monitors, checkpoints and resumes.

    The trainer is given a transformed model, or a module that contains it::

        bio_model, _ = biofx.transform(model, config, example_inputs=...)
        plasticity = Plasticity(["crystallize"], monitor=biofx.Monitor(path="run.jsonl", append=True))
        trainer = transformers.Trainer(bio_model, arguments, train_dataset=data, callbacks=[plasticity])
        trainer.train()  # or resume_from_checkpoint=True, and it goes on from there

    It attaches to the trainer's optimizer when training starts. The state of plasticity is in the file
    ``trainer_state.json`` of each checkpoint, tensors as text: 5 bytes a synapse where crystallization
    dampens weights that have no factors (``"baseline"``), and next to nothing otherwise. Under DDP the ranks
    agree on activity, and the first alone writes.

    Args:
        schedule: rules and when they run, as for :func:`biofx.attach`.
        monitor: records steps.
        observers: called after each step, besides the monitor.
        decay: as for :func:`biofx.attach`.
        updates: as for :func:`biofx.attach`.
        model: path of the transformed model in the trainer's, where there are several.

    Raises:
        InputError: transformers is missing. When training starts: the trainer's model contains no transformed
            model, or several and none is named; or ``restore_callback_states_from_checkpoint`` is set, with
            which the trainer would make this callback anew, without its options.
        PlasticityError: when training starts: as :func:`biofx.attach`, or a checkpoint is of another
            schedule.
    """

    def __init__(
        self,
        schedule: Iterable[Rule | str] = (),
        *,
        monitor: Monitor | None = None,
        observers: Iterable[Observer] = (),
        decay: str = "scaled",
        updates: str = "additive",
        model: str | None = None,
    ) -> None:
        super().__init__()
        self._run = PlasticRun(
            schedule, monitor=monitor, observers=observers, decay=decay, updates=updates, model=model
        )

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """The one to the trainer's optimizer; empty before training starts."""
        return self._run.attachments

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, after the trainer has loaded what it resumes from."""
        if args.restore_callback_states_from_checkpoint:
            raise InputError(
                "expected TrainingArguments(restore_callback_states_from_checkpoint=False), with which the "
                "state of plasticity is restored all the same, found True: callbacks are made anew then, "
                "without schedule and monitor"
            )
        self._run.resume_from(self._saved(state) if state.global_step > 0 else None)
        group = None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            group = distributed.group.WORLD  # that of the wrapper, which callbacks are not shown
        self._run.attach(kwargs["model"], [kwargs["optimizer"]], group=group)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bring what was recorded to the disk."""
        if self._run.monitor is not None:
            self._run.monitor.close()

    def _saved(self, state: Any) -> Any:
        """Return what a checkpoint holds of the plasticity; warn where it holds nothing."""
        entries = state.stateful_callbacks.setdefault(type(self).__name__, {})  # the trainer relies on one
        listed = entries if isinstance(entries, list) else [entries]
        attributes = [entry.get("attributes", {}) for entry in listed]
        ours = [entry for entry in attributes if entry.get(_MODEL) == self._run.path and _SAVED in entry]
        if not ours:
            self._run.warn_of_none()
            return None
        saved = ours[-1][_SAVED]  # of several callbacks the trainer keeps a list that grows with each save
        return torch.load(io.BytesIO(base64.b85decode(saved)), map_location="cpu", weights_only=True)

    def state(self) -> dict[str, Any]:
        """Return what ``trainer_state.json`` holds of the plasticity."""
        content = self._run.state_dict()
        if not content:
            return {"args": {}, "attributes": {}}
        file = io.BytesIO()
        torch.save(content, file)
        text = base64.b85encode(file.getvalue()).decode("ascii")
        return {"args": {}, "attributes": {_MODEL: self._run.path, _SAVED: text}}
