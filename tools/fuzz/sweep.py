"""Random trials, made smaller where they fail: ``python tools/fuzz 10``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from torch import nn

from fuzz.journeys import JOURNEYS
from fuzz.model_kinds import MODELS
from fuzz.module_changes import MODULE_CHANGES
from fuzz.setups import CONFIGS, Setup
from fuzz.tensor_changes import TENSOR_CHANGES
from fuzz.trial import NextChange, Verdict, run, run_again

ALL_CHANGES = (*MODULE_CHANGES, *TENSOR_CHANGES, *JOURNEYS)
LONGEST = 6


@dataclass(frozen=True)
class Finding:
    """A trial that failed, as small as it could be made."""

    setup: Setup
    changes: tuple[str, ...]
    verdict: Verdict

    def __str__(self) -> str:
        """The trial as a script."""
        lines = "".join(f"    {change!r},\n" for change in self.changes)
        return (
            f"# seed {self.setup.seed}: {self.verdict.message}\n"
            "import sys\n\n"
            'sys.path[:0] = [".", "tools"]  # run in the folder of the project\n'
            "from fuzz.trial import Setup, run_again\n\n"
            f"setup = {self.setup!r}\nprint(run_again(setup, [\n{lines}]))\n"
        )


def setup_of(seed: int) -> Setup:
    """The model and the config of a seed."""
    chance = Random(seed)
    return Setup(
        seed,
        chance.choice([*MODELS, "random", "random", "random"]),
        chance.choice(list(CONFIGS)),
        chance.choice(("train", "train", "eval")),
        recorded=chance.random() < 0.4,
        shared=chance.random() < 0.2,
    )


def changes_of(seed: int) -> NextChange:
    """The changes of a seed, each chosen when it is known what the model has become."""
    chance = Random(seed + 1)

    def next_change(place: int, model: nn.Module) -> str | None:
        return chance.choice(ALL_CHANGES)(chance, model)

    return next_change


def one(seed: int) -> tuple[Setup, list[str], Verdict]:
    """Run the trial of a seed."""
    setup = setup_of(seed)
    made, verdict = run(setup, changes_of(seed), LONGEST)
    return setup, made, verdict


def made_smaller(setup: Setup, changes: Sequence[str], verdict: Verdict) -> Finding:
    """Leave out changes, and then what is special about the setup, while it fails in the same way."""

    def fails(setup: Setup, changes: Sequence[str]) -> bool:
        found = run_again(setup, changes)
        return found.outcome == "failed" and found.sort == verdict.sort

    left = list(changes)
    while True:
        for place in reversed(range(len(left))):
            if fails(setup, left[:place] + left[place + 1 :]):
                del left[place]
                break
        else:
            break
    for simpler in ({"recorded": False}, {"shared": False}, {"mode": "train"}, {"config": "off"}):
        tried = replace(setup, **simpler)
        setup = tried if tried != setup and fails(tried, left) else setup
    return Finding(setup, tuple(left), run_again(setup, left))


def sweep(seeds: Iterable[int], counted: Counter[str], *, until: float = float("inf")) -> Finding | None:
    """Run the trials of some seeds up to the first that fails, and make that one smaller."""
    for seed in seeds:
        if time.monotonic() > until:
            break
        setup, made, verdict = one(seed)
        counted[verdict.outcome] += 1
        if verdict.outcome == "failed":
            return made_smaller(setup, made, verdict)
    return None
