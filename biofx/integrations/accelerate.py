"""Plasticity in a loop with Accelerate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from biofx.diagnostics.monitor import Monitor
from biofx.errors import InputError
from biofx.integrations.plastic_run import PlasticRun
from biofx.plasticity.optimizer_step import Observer
from biofx.plasticity.rule import Rule


def attach(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    schedule: Iterable[Rule | str] = (),
    *,
    monitor: Monitor | None = None,
    observers: Iterable[Observer] = (),
    decay: str = "scaled",
    updates: str = "additive",
) -> PlasticRun:
    """Attach plasticity to what an accelerator has prepared, and let it save and load the state.

    ::

        bio_model, optimizer, loader = accelerator.prepare(bio_model, optimizer, loader)
        plasticity = attach(accelerator, bio_model, optimizer, ["crystallize"])
        ...
        accelerator.save_state("checkpoint")  # has the state of plasticity, too
        accelerator.load_state("checkpoint")  # and gives it back

    The ranks of a distributed run agree on activity, as the prepared model is wrapped, and the first alone
    writes. A monitor's curves go to the accelerator's trackers with ``Monitor(log=accelerator.log)``.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        model: what ``accelerator.prepare`` returned: a transformed model, or a module that contains one.
        optimizer: what ``accelerator.prepare`` returned, or several in a list.
        schedule: rules and when they run, as for :func:`biofx.attach`.
        monitor: records steps.
        observers: called after each step, besides the monitor.
        decay: as for :func:`biofx.attach`.
        updates: as for :func:`biofx.attach`.

    Returns:
        The run: its ``attachments``, one for each optimizer that steps the model.

    Raises:
        InputError: ``accelerator`` is something else, or ``model`` contains no transformed model.
        PlasticityError: as :func:`biofx.attach`; ``load_state`` raises it for the state of another schedule.
    """
    if not hasattr(accelerator, "register_for_checkpointing"):
        raise InputError(f"expected an accelerate.Accelerator, found a {type(accelerator).__name__}")
    run = PlasticRun(schedule, monitor=monitor, observers=observers, decay=decay, updates=updates)
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    run.attach(model, optimizers, group=getattr(model, "process_group", None))
    accelerator.register_for_checkpointing(run)
    return run
