"""``python tools/fuzz 10``: ten minutes, half of properties of random models and files, half of changes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from fuzz.sweep import sweep

ROOT = Path(__file__).resolve().parent.parent.parent
TRIALS = 100
"""In one round, of changes."""


def main(arguments: list[str] | None = None) -> int:
    """Run rounds until the time is up or one finds something; return 1 if one does."""
    parser = argparse.ArgumentParser(prog="python tools/fuzz", description=__doc__)
    parser.add_argument("minutes", type=float, nargs="?", default=10)
    parser.add_argument("--seed", type=int, help="of the first trial of changes; another one in each run")
    parser.add_argument("--changes-only", action="store_true", help="no properties of models and files")
    chosen = parser.parse_args(arguments)
    first = int.from_bytes(os.urandom(4), "little") if chosen.seed is None else chosen.seed
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * chosen.minutes
    counted: Counter[str] = Counter()
    while time.monotonic() < end:
        found = sweep(range(first, first + TRIALS), counted, until=end)
        if found is not None:
            print(found)
            return 1
        if not chosen.changes_only and properties_fail(first):
            return 1
        first += TRIALS
        counted["rounds"] += 1
    print("found nothing: " + ", ".join(f"{count} {name}" for name, count in sorted(counted.items())))
    return 0


def properties_fail(seed: int) -> bool:
    """Run the properties of ``tests/test_fuzz.py`` with other numbers; show what fails."""
    command = [sys.executable, "-m", "pytest", "tests/test_fuzz.py", f"--hypothesis-seed={seed}"]
    environment = {**os.environ, "BIOFX_FUZZ_EXAMPLES": "100"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"seed {seed}:\n{done.stdout}")
    return bool(done.returncode)
