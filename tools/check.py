"""The whole loop before a commit, one line per step: ``python tools/check.py``."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "tests, docstrings, README": ["pytest"],
}


def main() -> int:
    """Run every step, show the output of those that fail, and return how many did."""
    console = Console(highlight=False)
    failures = 0
    for name, command in STEPS.items():
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        last = (done.stdout.strip().splitlines() or [""])[-1]
        mark = "[green]ok  [/]" if done.returncode == 0 else "[red]FAIL[/]"
        console.print(f"{mark} {name} ({seconds:.0f} s)  ", end="")
        console.print(last, markup=False)
        if done.returncode:
            failures += 1
            console.print(done.stdout + done.stderr, markup=False)
    return failures


if __name__ == "__main__":
    sys.exit(main())
