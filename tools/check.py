"""The whole loop before a commit, one line per step: ``python tools/check.py``; or steps by name."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "format": ["-m", "ruff", "format", "--check", "."],
    "lint": ["-m", "ruff", "check", "."],
    "types": ["-m", "mypy"],
    "package": ["tools/package.py"],
    "tests": ["-m", "pytest"],
}
"""What Python runs, by name; the tests are those of docstrings and of the README too."""


def main(chosen: list[str]) -> int:
    """Run the chosen steps, or all, show the output of those that fail, and return how many did."""
    if unknown := set(chosen) - set(STEPS):
        sys.exit(f"no step {' or '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    console = Console(highlight=False)
    failures = 0
    for name in chosen or STEPS:
        command = STEPS[name]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
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
    sys.exit(main(sys.argv[1:]))
