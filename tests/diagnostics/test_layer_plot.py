from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from biofx import OptionError
from biofx.diagnostics import LayerRecord, StepRecord
from biofx.diagnostics.layer_plot import plot_layers
from biofx.diagnostics.monitor_records import BINS
from biofx.diagnostics.unit_activity import UnitActivity
from biofx.errors import InputError


def layer(**changes: Any) -> LayerRecord:
    counts = [0] * BINS
    counts[6], counts[8] = 10, 30
    fields: dict[str, Any] = {
        "synapses": 40,
        "factor_mean": 1.0,
        "factor_std": 0.1,
        "factor_histogram": tuple(counts),
        "crystallized": 10,
        "excitation": 3.0,
        "inhibition": 1.0,
    }
    return LayerRecord(**{**fields, **changes})


def records() -> list[StepRecord]:
    moved = {"touched": {"rejuvenate_weights": 4}}
    return [
        StepRecord(0, {"a.weight": layer(**moved), "_b$x$.weight": layer()}),
        StepRecord(5, {"a.weight": layer(**moved, wrong_signs=2), "_b$x$.weight": layer(excitation=0.0)}),
    ]


def test_each_layer_is_a_row_with_factors_signs_and_turnover(tmp_path: Path) -> None:
    figure: Any = plot_layers(records(), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
    rates, signs, turnover = figure.axes[:3]
    assert [text.get_text() for text in rates.get_yticklabels()] == ["a", r"_b\$x\$"]
    (image,) = rates.get_images()
    drawn = image.get_array()
    assert drawn.shape == (2, BINS)
    assert drawn[0, 6] == 25
    assert drawn[0, 8] == 75
    widths = [(bar.get_x(), bar.get_width()) for bar in signs.patches]
    assert widths[:2] == [(0, 75), (75, 25)]
    assert widths[2:] == [(0, 0), (0, 100)]
    assert [text.get_text() for text in signs.texts] == ["2 wrong"]
    assert [bar.get_width() for bar in turnover.patches] == [20, 0]  # 4 + 4 of 40
    assert figure.get_suptitle() == "step 5"


def test_units_that_were_seen_have_panels_of_their_own(tmp_path: Path) -> None:
    seen = UnitActivity(
        units=8,
        samples=4,
        mean_magnitude=1.0,
        dormant=6,
        dead=2,
        rank_samples=4,
        effective_rank=2.0,
        stable_rank=1.0,
    )
    moved = layer(activity=seen, unit_age=3.0, touched={"rejuvenate_units": 3})
    both = {"a.weight": moved, "b.weight": layer()}
    figure: Any = plot_layers([StepRecord(0, both), StepRecord(5, both)], tmp_path / "layers.png")
    silent, replaced = figure.axes[3:5]
    assert [bar.get_width() for bar in silent.patches] == [75, 25]  # 6 and 2 of 8
    assert [bar.get_width() for bar in replaced.patches] == [75, 0]  # 3 + 3 of 8


def test_what_was_not_recorded_is_said_to_be_missing() -> None:
    bare = layer(factor_mean=None, factor_histogram=(), crystallized=None, excitation=math.nan)
    figure: Any = plot_layers([StepRecord(0, {"a.weight": bare})])
    rates, signs, turnover = figure.axes[:3]
    assert [text.get_text() for text in (*rates.texts, *turnover.texts)] == ["nothing recorded"] * 2
    assert not signs.patches


def test_nothing_recorded_and_a_file_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no records"):
        plot_layers([])
    with pytest.raises(OptionError, match="cannot write the picture"):
        plot_layers(records(), tmp_path / "no" / "such.png")
