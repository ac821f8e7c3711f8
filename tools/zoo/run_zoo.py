"""Capture models that others wrote, and print what becomes of each.

``python tools/zoo/run_zoo.py [--recorded] [WORD …]``, with example inputs or without; a WORD picks models.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import comparison
import pytorchcv_models
import transformers_models


def main(arguments: list[str]) -> int:
    """Print a line for each model, and the sums."""
    recorded = "--recorded" in arguments
    words = [word.lower() for word in arguments if not word.startswith("--")]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcomes = []
    for name, build in (*transformers_models.models(), *pytorchcv_models.models()):
        if words and not any(word in name.lower() for word in words):
            continue
        started = time.perf_counter()
        try:
            model, example = build()
            args, kwargs = example(2)
            with torch.no_grad():
                model.eval()(*args, **kwargs)
        except Exception as error:
            print(f"{name:38} not built: {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        outcome = comparison.compare(name, model, example, recorded=recorded)
        outcome.cost = comparison.cost(model)
        outcomes.append(outcome)
        print(
            f"{name:38} {outcome.verdict:9} visible {outcome.visible:4.0%} sites {outcome.sites:4.0%} "
            f"scaled {outcome.scaled:4.0%} "
            f"graphs {outcome.graphs:3} kept {outcome.kept:3} cost {outcome.cost:4.1f} "
            f"{time.perf_counter() - started:5.1f}s {outcome.note[:400]}",
            flush=True,
        )
    count = max(1, len(outcomes))
    for verdict in ("equal", "refused", "DIFFERENT"):
        number = sum(outcome.verdict == verdict for outcome in outcomes)
        print(f"{verdict}: {number} of {len(outcomes)} ({number / count:.1%})")
    weights = max(1, sum(outcome.parameters for outcome in outcomes))
    visible = sum(outcome.visible * outcome.parameters for outcome in outcomes) / weights
    print(f"visible weights: {visible:.1%}; mean over models {sum(o.visible for o in outcomes) / count:.1%}")
    return any(outcome.verdict == "DIFFERENT" for outcome in outcomes)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
