"""Run the tests on the lowest and the newest torch that pyproject.toml names: ``python tools/versions.py``.

Each release gets a fresh environment in a folder that is removed afterwards, with what the README's test
command installs there. Where the index has torch with CUDA alone, that is gigabytes; nothing needs a GPU.
``--torch 2.14.1`` takes another release.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
_LEFT_TO_TORCH = ("torch", "setuptools")
"""What is not installed as ``tools/constraints.txt`` pins it: releases of torch bound the second one."""


class VersionsError(Exception):
    """An environment cannot be made; the message has the output."""


def main(arguments: list[str]) -> int:
    """Run the tests on each release, print how each ended, and return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", action="append", metavar="RELEASE", help="this one; may be repeated")
    required = torch_required((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ends, failures = [], 0
    for release in parser.parse_args(arguments).torch or [lowest(required), newest(required)]:
        with tempfile.TemporaryDirectory() as name:
            python = environment(Path(name), release)
            found = _run([str(python), "-c", "import torch; print(torch.__version__)"]).stdout.strip()
            print(f"torch {found}: the tests run", flush=True)
            done = _run([str(python), "-m", "pytest"], fails=True)
        ends.append(f"torch {found}: {done.stdout.strip().splitlines()[-1].strip('= ')}")
        print(ends[-1], flush=True)
        if done.returncode:
            failures += 1
            print(done.stdout + done.stderr, flush=True)
    print("; ".join(ends))
    return failures


def torch_required(text: str) -> Requirement:
    """Return what a ``pyproject.toml`` asks of torch, given its text."""
    found = re.search(r'^dependencies = \[.*"(torch\b[^"]*)"', text, re.MULTILINE)
    if found is None:
        raise VersionsError("pyproject.toml names no torch among its dependencies")
    return Requirement(found[1])


def lowest(required: Requirement) -> str:
    """Return the lowest release that a requirement allows."""
    bounds = [each.version for each in required.specifier if each.operator in (">=", "==", "~=")]
    if len(bounds) != 1:
        raise VersionsError(f"expected one lower bound, found {required}")
    return bounds[0]


def newest(required: Requirement) -> str:
    """Return the newest release on the index that a requirement allows."""
    command = ["-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        _run([sys.executable, *command, "--report", report.name, str(required)])
        (found,) = json.load(report)["install"]
    return str(found["metadata"]["version"])


def environment(folder: Path, release: str) -> Path:
    """Install torch and what the tests need into a new environment; return its Python.

    Args:
        folder: of the environment.
        release: of torch.

    Raises:
        VersionsError: something cannot be installed.
    """
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    pinned = (ROOT / "tools" / "constraints.txt").read_text(encoding="utf-8")
    constraints = folder / "constraints.txt"
    constraints.write_text(constraints_for(release, pinned), encoding="utf-8")
    _run(
        [
            *(str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir"),
            *("-e", ".[test]", "-c", str(constraints)),
        ]
    )
    return python


def constraints_for(release: str, pinned: str) -> str:
    """Return constraints with another release of torch, without what releases bound themselves."""
    lines = [line for line in pinned.splitlines() if line.partition("==")[0] not in _LEFT_TO_TORCH]
    return "\n".join([*lines, f"torch=={release}"]) + "\n"


def _run(command: list[str], *, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command in the root, without the paths and constraints of the environment at hand."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own["PIP_CONSTRAINT"] = os.devnull  # of the machine, which may hold torch back
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=own)
    if done.returncode and not fails:
        raise VersionsError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except VersionsError as error:
        sys.exit(str(error))
