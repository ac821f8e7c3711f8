"""How far signs, learning-rate factors and splits reach in transformers as they come, with example inputs.

``python tools/zoo/coverage_of_transformers.py [WORD …]`` prints a table in Markdown; a WORD picks models.
Each is small and has random weights, its config is as it comes (``use_cache`` at its default).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import transformers_models

import biofx
from biofx.rewriting import MechanismCoverage

MODELS = (
    *("Bert", "GPT2", "Llama", "Qwen2Moe", "Gemma", "T5", "Bart"),
    *("Whisper", "ViT", "Swin", "CLIP", "ConvNext", "Mamba"),
)
MECHANISMS = ("signed", "scaled", "split")
CONFIG = biofx.BioConfig(
    apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0.2, weight_splitting_Gamma=2
)


def reach_of(name: str) -> dict[str, MechanismCoverage]:
    """Transform a model with its example, and return how far each mechanism reached."""
    model, example = dict(transformers_models.models())[f"transformers {name}"]()
    coverage = biofx.transform(model, CONFIG, example_inputs=example(2)).report.coverage
    if coverage is None:
        raise RuntimeError(f"{name}: the report has no coverage")
    return {entry.mechanism: entry for entry in coverage.mechanisms}


def table(found: Mapping[str, Mapping[str, MechanismCoverage]]) -> Iterator[str]:
    """Yield the lines of a table: weights, share of their elements, and the reasons for the rest."""
    yield "| model | " + " | ".join(f"{name}: weights, elements" for name in MECHANISMS) + " | the rest |"
    yield "| --- |" + " --- |" * (len(MECHANISMS) + 1)
    for model, reach in found.items():
        cells = [_cell(reach[name]) for name in MECHANISMS]
        rest = [
            f"{name}: {elements} {reason}" for name in MECHANISMS for reason, elements in _left(reach[name])
        ]
        yield f"| {model} | {' | '.join(cells)} | {'; '.join(rest)} |"
    means = [sum(reach[name].fraction for reach in found.values()) / len(found) for name in MECHANISMS]
    yield "| mean over models | " + " | ".join(f"{mean:.1%}" for mean in means) + " | |"


def _cell(reach: MechanismCoverage) -> str:
    share = reach.elements / reach.all_elements if reach.all_elements else 1.0
    return f"{reach.weights} of {reach.all_weights}, {share:.1%}"


def _left(reach: MechanismCoverage) -> list[tuple[str, int]]:
    return list(reach.reasons.items())


def main(words: list[str]) -> int:
    """Print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [name for name in MODELS if not words or any(word.lower() in name.lower() for word in words)]
    for line in table({name: reach_of(name) for name in chosen}):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
