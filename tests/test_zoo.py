"""A few models that others wrote; ``python tools/zoo/run_zoo.py`` has the rest."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ZOO = Path(__file__).parents[1] / "tools" / "zoo"
MODELS = ("Bert", "GPT2", "Llama", "T5", "ViT", "CLIP", "Whisper", "Mamba", "Qwen2Moe")
RECORDED = ("Bert", "Llama", "ViT")

pytest.importorskip("transformers", reason="the zoo needs transformers: pip install transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, dict[str, Any]]]:
    monkeypatch.syspath_prepend(str(ZOO))
    comparison = importlib.import_module("comparison")
    models = dict(importlib.import_module("transformers_models").models())
    yield comparison, models
    for name in ("comparison", "transformers_models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "recorded"), [*((name, False) for name in MODELS), *((name, True) for name in RECORDED)]
)
def test_a_model_of_transformers_is_equal_in_both_modes_and_can_be_trained(
    name: str, recorded: bool, zoo: tuple[Any, dict[str, Any]]
) -> None:
    comparison, models = zoo
    model, example = models[f"transformers {name}"]()
    outcome = comparison.compare(name, model, example, recorded=recorded)
    assert (outcome.verdict, outcome.note) == ("equal", "")
    if name != "GPT2":  # all of its weights are in layers of its own kind
        assert outcome.scaled > 0.3


@pytest.mark.parametrize("name", ["GPT2", "Qwen2Moe"])
def test_all_signable_weights_of_a_transformer_have_signs_and_the_table_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ZOO))
    coverage = importlib.import_module("coverage_of_transformers")
    reach = coverage.reach_of(name)
    assert reach["signed"].fraction == reach["scaled"].fraction == 1
    lines = list(coverage.table({name: reach}))
    assert lines[2].startswith(f"| {name} | {reach['signed'].weights} of {reach['signed'].weights}, 100.0% |")
    assert lines[-1].startswith("| mean over models | 100.0% | 100.0% |")
    for module in ("coverage_of_transformers", "transformers_models"):
        sys.modules.pop(module, None)
