"""Capture models that others wrote, and say what becomes of each.

``python tools/zoo/run_zoo.py [--recorded] [--limit SECONDS] [--json FILE] [--cost] [WORD …]``: with example
inputs or without; a WORD picks models. Each model has a process of its own, which is ended after the limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import comparison
import torchvision_operators
from comparison import Outcome

PACKAGES = {
    "idioms": "biofx",
    "transformers_models": "transformers",
    "other_models": "einops",
    "spiking_models": "torch",
    "neuroscience_models": "torch",
    "diffusion_models": "diffusers",
    "torchvision_models": "torchvision",
    "timm_models": "timm",
    "pytorchcv_models": "pytorchcv",
}


def main(arguments: list[str]) -> int:
    """Print a line for each model, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--limit", type=float, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("words", nargs="*", type=str.lower)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcomes = []
    for name, build in _models():
        if options.words and not any(word in name.lower() for word in options.words):
            continue
        started = time.perf_counter()
        outcome = _in_its_own_process(name, build, options)
        outcomes.append(outcome)
        print(f"{_line(outcome)} {time.perf_counter() - started:5.1f}s {outcome.note[:400]}", flush=True)
        if options.json:
            options.json.write_text(json.dumps([dataclasses.asdict(found) for found in outcomes], indent=1))
    for line in summary(outcomes):
        print(line)
    return any(outcome.verdict in ("DIFFERENT", "untrained") for outcome in outcomes)


def _models() -> Iterator[tuple[str, Callable[[], Any]]]:
    torchvision_operators.declare()
    for file, package in PACKAGES.items():
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)  # once, for all the processes
            yield from importlib.import_module(file).models()


def _in_its_own_process(name: str, build: Callable[[], Any], options: argparse.Namespace) -> Outcome:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(name, build, options, theirs))
    process.start()
    theirs.close()
    try:
        found: Outcome = ours.recv() if ours.poll(options.limit) else Outcome(name, "too slow")
    except EOFError:
        found = Outcome(name, "died")
    process.kill()
    process.join()
    return found


def _examine(name: str, build: Callable[[], Any], options: argparse.Namespace, answer: Connection) -> None:
    try:
        model, example = build()
        args, kwargs = example(2)
        model.eval()
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        answer.send(Outcome(name, "not built", f"{type(error).__name__}: {str(error)[:100]}"))
        return
    try:
        outcome = comparison.compare(name, model, example, recorded=options.recorded)
        if options.cost:
            outcome.cost = comparison.cost(model)
    except Exception as error:
        outcome = Outcome(name, "DIED", f"{type(error).__name__}: {error}")
    answer.send(outcome)


def _line(outcome: Outcome) -> str:
    return (
        f"{outcome.name:44} {outcome.verdict:9} visible {outcome.visible:4.0%} sites {outcome.sites:4.0%} "
        f"scaled {outcome.scaled:4.0%} graphs {outcome.graphs:3} kept {outcome.kept:3} "
        f"cost {outcome.cost:4.1f}"
    )


def summary(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield the sums, as lines."""
    built = [outcome for outcome in outcomes if outcome.verdict not in ("not built", "too slow")]
    count = max(1, len(built))
    yield f"{len(built)} models, {len(outcomes) - len(built)} not built or too slow"
    for verdict in sorted({outcome.verdict for outcome in outcomes}):
        number = sum(outcome.verdict == verdict for outcome in outcomes)
        yield f"{verdict}: {number} ({number / count:.1%})"
    captured = [outcome for outcome in built if outcome.parameters]
    trains = sum(outcome.in_training for outcome in captured)
    evaluates = sum(outcome.in_evaluation for outcome in captured)
    yield f"equal in training: {trains} ({trains / count:.1%})"
    yield f"equal in evaluation: {evaluates} ({evaluates / count:.1%})"
    weights = max(1, sum(outcome.parameters for outcome in captured))
    visible = sum(outcome.visible * outcome.parameters for outcome in captured) / weights
    mean = sum(outcome.visible for outcome in captured) / max(1, len(captured))
    yield f"visible parameters: {visible:.1%} of all; mean over models {mean:.1%}"
    scaled = sum(outcome.scaled for outcome in captured) / max(1, len(captured))
    yield f"scaled, of the elements of synapses: mean over models {scaled:.1%}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
