"""TensorBoard itself reads what a monitor wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

import biofx
from tests.clients.runs import by_hand

pytest.importorskip("tensorboard")


@pytest.mark.parametrize("given", ["a folder", "a writer"])
def test_curves_and_histograms_are_read_again(tmp_path: Path, given: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    place = tmp_path if given == "a folder" else SummaryWriter(str(tmp_path))
    monitor = biofx.Monitor(every=4, tensorboard=place)
    by_hand(monitor=monitor)
    monitor.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {scalar.step: scalar.value for scalar in events.Scalars("factor mean/0.weight")}
    means = {record.step: record.layers["0.weight"].factor_mean for record in monitor.records}
    assert found == pytest.approx(means, rel=1e-6)
    assert list(found) == [0, 4, 8]
    (histogram, *_) = events.Histograms("factors/0.weight")
    assert histogram.histogram_value.num == monitor.records[0].layers["0.weight"].synapses
