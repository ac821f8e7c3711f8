"""The whole loop before a commit, one line per step: ``python tools/check.py``; or steps by name.

``python tools/check.py versions`` runs the tests on the lowest and the newest torch that pyproject.toml
names, and with ``--torch 2.14.1`` on another. It downloads gigabytes, so it runs only where it is named.
"""

from __future__ import annotations

import argparse
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
ASKED_FOR = {"versions": ["tools/versions.py"]}
"""What it runs only if it is named."""


def main(arguments: list[str]) -> int:
    """Run the chosen steps, or all, show the output of those that fail, and return how many did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join((*STEPS, *ASKED_FOR))}")
    parser.add_argument("--torch", action="append", metavar="RELEASE", help="for versions; may be repeated")
    chosen = parser.parse_args(arguments)
    commands = {**STEPS, **ASKED_FOR}
    if unknown := set(chosen.steps) - set(commands):
        sys.exit(f"no step {' or '.join(sorted(unknown))}; there are {', '.join(commands)}")
    commands["versions"] = [*commands["versions"], *(f"--torch={each}" for each in chosen.torch or ())]
    console = Console(highlight=False)
    failures = 0
    for name in chosen.steps or STEPS:
        command = commands[name]
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
