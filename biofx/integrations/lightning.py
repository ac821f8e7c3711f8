"""Plasticity in a Trainer of Lightning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from biofx.diagnostics.monitor import Monitor
from biofx.integrations.plastic_run import PlasticRun, missing
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.optimizer_step import Observer
from biofx.plasticity.rule import Rule

try:
    from lightning.pytorch import Callback
except ImportError as first:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        Callback = missing("lightning", first)


class Plasticity(Callback):  # type: ignore[misc]
    """Runs a model's plasticity in a ``lightning.Trainer``: attaches, monitors, checkpoints and resumes.

    The LightningModule contains a transformed model and builds its optimizers from it, as from any other::

        class Task(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.bio_model, _ = biofx.transform(Network(), config)
            ...

        plasticity = Plasticity(["crystallize"], monitor=biofx.Monitor(every=100))
        trainer = lightning.Trainer(callbacks=[plasticity])
        trainer.fit(task, data)  # or ckpt_path="last.ckpt", and it goes on from there

    It attaches to every optimizer that steps the model, when training starts. The state of plasticity is in
    the trainer's checkpoints, beside those of model and optimizers. Under DDP the ranks agree on activity,
    and the first alone writes. Sharded models (FSDP) train, but the trainer cannot save what rules remember
    of each synapse.

    Args:
        schedule: rules and when they run, as for :func:`biofx.attach`.
        monitor: records steps; what it records goes to the trainer's loggers, too.
        observers: called after each step, besides the monitor.
        decay: as for :func:`biofx.attach`.
        updates: as for :func:`biofx.attach`.
        model: path of the transformed model in the LightningModule, where there are several.
        log: whether the trainer's loggers get the curves of the monitor.

    Raises:
        InputError: Lightning is missing. When training starts: the LightningModule contains no transformed
            model, or several and none is named.
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
        log: bool = True,
    ) -> None:
        super().__init__()
        self._run = PlasticRun(
            schedule, monitor=monitor, observers=observers, decay=decay, updates=updates, model=model
        )
        self._log = log

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """One for each optimizer that steps the model; empty before training starts."""
        return self._run.attachments

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state: callbacks of several models have one each."""
        return str(self._generate_state_key(model=self._run.path))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget what a checkpoint said that was not trained from."""
        self._run.resume_from(None)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, after the trainer has loaded what it resumes from."""
        group = getattr(trainer.model, "process_group", None)
        self._run.attach(pl_module, trainer.optimizers, group=group)
        if self._run.monitor is not None and self._log:
            for logger in trainer.loggers:
                self._run.monitor.log_to(logger.log_metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Bring what was recorded to the disk."""
        if self._run.monitor is not None:
            self._run.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the plasticity."""
        return self._run.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where another run stopped, when training starts."""
        self._run.resume_from(state_dict)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Warn where training goes on from a checkpoint without the state of this callback."""
        if trainer.training and not checkpoint.get("callbacks", {}).get(self.state_key):
            self._run.warn_of_none()
