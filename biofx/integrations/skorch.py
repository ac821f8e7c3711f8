"""Plasticity in a net of skorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from biofx.diagnostics.monitor import Monitor
from biofx.integrations.plastic_run import PlasticRun, missing
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.optimizer_step import Observer
from biofx.plasticity.rule import Rule

try:
    from skorch.callbacks import Callback
except ImportError as error:
    Callback = missing("skorch", error)


class Plasticity(Callback):  # type: ignore[misc]
    """Runs a model's plasticity in a net of skorch: attaches, monitors, checkpoints and resumes.

    The net is given a transformed model, or a class or function that makes a module with one. A
    ``Checkpoint`` saves the state of plasticity as ``f_plasticity``, beside ``f_params`` and ``f_optimizer``,
    and what loads checkpoints comes after this callback::

        checkpoint = Checkpoint(dirname="run", monitor=None, f_plasticity="plasticity.pt")
        net = NeuralNetClassifier(
            bio_model,
            optimizer=torch.optim.AdamW,
            callbacks=[Plasticity(["crystallize"]), checkpoint, LoadInitState(checkpoint)],
        )
        net.fit(x, y)  # the second time it goes on from there

    It attaches to the net's optimizer when training starts. ``net.plasticity_`` is the run: its
    ``attachments``, ``state_dict()`` and ``load_state_dict()``.

    Args:
        schedule: rules and when they run, as for :func:`biofx.attach`.
        monitor: records steps. Clones of the net get one of their own, without its files.
        observers: called after each step, besides the monitor.
        decay: as for :func:`biofx.attach`.
        updates: as for :func:`biofx.attach`.
        model: path of the transformed model in ``net.module_``, where there are several.

    Raises:
        InputError: skorch is missing. When training starts: the net's module contains no transformed model,
            or several and none is named.
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
        # as they are given: skorch makes clones from them
        self.schedule, self.monitor, self.observers = schedule, monitor, observers
        self.decay, self.updates, self.model = decay, updates, model

    def initialize(self) -> Plasticity:
        """Begin without an attachment, as the net makes its module and optimizer anew."""
        self.run_ = PlasticRun(
            self.schedule,
            monitor=self.monitor,
            observers=self.observers,
            decay=self.decay,
            updates=self.updates,
            model=self.model,
        )
        return self

    @property
    def attachments_(self) -> tuple[Attachment, ...]:
        """One for each optimizer that steps the model; empty before training starts."""
        return self.run_.attachments

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:  # noqa: N803
        """Attach, before what resumes a run is loaded."""
        net.plasticity_ = self.run_
        optimizers = [getattr(net, f"{name}_") for name in net._optimizers]
        self.run_.attach(net.module_, optimizers)

    def on_train_end(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:  # noqa: N803
        """Bring what was recorded to the disk."""
        if self.monitor is not None:
            self.monitor.close()
