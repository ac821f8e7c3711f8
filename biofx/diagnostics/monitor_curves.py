"""A monitor's records as curves: for TensorBoard, and for loggers in the manner of Weights & Biases.

The protocol of loggers is one call, ``log(values, step=step)``, with numbers by name: ``wandb.log``,
``mlflow.log_metrics``, ``accelerator.log``, ``log_metrics`` of the loggers of Lightning and others are that.
"""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import Any, Protocol

from biofx.diagnostics.monitor_records import HISTOGRAM_EDGES, LayerRecord, StepRecord
from biofx.errors import InputError


class Log(Protocol):
    """Takes numbers of a step, as ``wandb.log`` does."""

    def __call__(self, values: dict[str, float], /, *, step: int) -> object:
        """Take numbers by name, as ``"factor mean/0.weight"``, of the step of that number, from 0."""


class Curves:
    """Gives each record to a logger."""

    def __init__(self, log: Log) -> None:
        if not callable(log):
            raise InputError(
                f"log: expected what is called as log(values, step=step), such as wandb.log, found {log!r}"
            )
        self.log = log

    def write(self, record: StepRecord) -> None:
        """Give the numbers of a record."""
        self.log(curves(record), step=record.step)

    def flush(self) -> None:
        """Do nothing: a logger decides itself when it writes."""


class TensorBoard:
    """Writes each quantity of each layer as a curve, and the factors as a histogram.

    Args:
        place: a folder for its files, or a ``SummaryWriter``.

    Raises:
        InputError: the package ``tensorboard`` is missing.
    """

    def __init__(self, place: str | os.PathLike[str] | Any) -> None:
        if hasattr(place, "add_scalar"):
            self._writer: Any = place
            return
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise InputError(
                f"Monitor(tensorboard=...) needs the package tensorboard: pip install tensorboard ({error})"
            ) from error
        self._writer = module.SummaryWriter(log_dir=str(Path(place)))

    def write(self, record: StepRecord) -> None:
        """Add one point to each curve; what a layer does not have gets none."""
        for name, value in curves(record).items():
            self._writer.add_scalar(name, value, record.step)
        for path, layer in record.layers.items():
            if layer.factor_mean is not None and layer.factor_std is not None:
                self._add_histogram(f"factors/{path}", layer, record.step)

    def flush(self) -> None:
        """Bring the points to the disk, which the writer otherwise does every two minutes."""
        self._writer.flush()

    def _add_histogram(self, tag: str, layer: LayerRecord, step: int) -> None:
        count = sum(layer.factor_histogram)
        mean, spread = float(layer.factor_mean or 0), float(layer.factor_std or 0)
        self._writer.add_histogram_raw(
            tag,
            min=HISTOGRAM_EDGES[0],
            max=HISTOGRAM_EDGES[-1],
            num=count,
            sum=mean * count,
            sum_squares=spread**2 * (count - 1) + mean**2 * count,
            bucket_limits=list(HISTOGRAM_EDGES[1:]),
            bucket_counts=list(layer.factor_histogram),
            global_step=step,
        )


def curves(record: StepRecord) -> dict[str, float]:
    """Return the numbers of a record by quantity and layer, such as ``"factor mean/0.weight"``.

    What a layer does not have, and what is infinite or NaN, is left out. Their units are those of the
    properties of :class:`biofx.diagnostics.LayerRecord` and :class:`biofx.diagnostics.UnitActivity`.
    """
    return {
        f"{quantity}/{path}": float(value)
        for path, layer in record.layers.items()
        for quantity, value in _quantities(layer).items()
        if value is not None and math.isfinite(value)
    }


def _quantities(layer: LayerRecord) -> dict[str, float | None]:
    activity = layer.activity
    return {
        "factor mean": layer.factor_mean,
        "factor std": layer.factor_std,
        "crystallized fraction": layer.crystallized_fraction,
        "replaced synapses": layer.replaced,
        "density": layer.density,
        "turnover": None if layer.connections is None else layer.turnover,
        "wrong signs": layer.wrong_signs,
        "E-I ratio": layer.ei_ratio,
        "gradient norm": layer.gradient_norm,
        "update norm": layer.update_norm,
        "weight magnitude": layer.weight_magnitude,
        "synapse utility": layer.utility,
        "unit utility": layer.unit_utility,
        "unit age": layer.unit_age,
        "replaced units": None if layer.unit_age is None else layer.replaced_units,
        "dormant fraction": None if activity is None else activity.dormant_fraction,
        "dead fraction": None if activity is None else activity.dead_fraction,
        "effective rank": None if activity is None else activity.effective_rank,
        "stable rank": None if activity is None else activity.stable_rank,
    }
