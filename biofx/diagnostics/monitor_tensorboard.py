"""The monitor's records as curves and histograms in TensorBoard."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from biofx.diagnostics.monitor_records import HISTOGRAM_EDGES, LayerRecord, StepRecord
from biofx.errors import InputError


class TensorBoard:
    """Writes each quantity of each layer as a curve, and the factors as a histogram.

    Raises:
        InputError: the package ``tensorboard`` is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise InputError(
                f"Monitor(tensorboard=...) needs the package tensorboard: pip install tensorboard ({error})"
            ) from error
        self._writer: Any = module.SummaryWriter(log_dir=str(folder))

    def write(self, record: StepRecord) -> None:
        """Add one point to each curve; what a layer does not have gets none."""
        for path, layer in record.layers.items():
            for quantity, value in _curves(layer).items():
                if value is not None and math.isfinite(value):
                    self._writer.add_scalar(f"{quantity}/{path}", value, record.step)
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


def _curves(layer: LayerRecord) -> dict[str, float | None]:
    return {
        "factor mean": layer.factor_mean,
        "factor std": layer.factor_std,
        "crystallized fraction": layer.crystallized_fraction,
        "replaced synapses": layer.replaced,
        "wrong signs": layer.wrong_signs,
        "E-I ratio": layer.ei_ratio,
        "gradient norm": layer.gradient_norm,
        "update norm": layer.update_norm,
    }
