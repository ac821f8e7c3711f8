"""Build the package, install it where nothing else is, run its doctests there: ``python tools/package.py``.

The environment that it is installed into is fresh. Of the one at hand it has what the wheel says that it
needs, and pytest, as links: nothing is downloaded, and what the wheel needs without saying so is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
_DOCTESTS = [
    *("-m", "pytest", "--pyargs", "biofx", "--doctest-modules", "-q", "-p", "no:cacheprovider"),
    *("-o", "doctest_optionflags=NORMALIZE_WHITESPACE ELLIPSIS", "-W", "error"),
    *("-W", "ignore:Failed to initialize NumPy"),  # which torch asks for and does not require
]


class PackagingError(Exception):
    """A step failed; the message has its output."""


def main() -> None:
    """Do it, and say what was done in a line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder)
        python = fresh_environment(folder / "environment", wheel)
        place = _run([str(python), "-c", "import biofx; print(biofx.__file__)"], folder).strip()
        if not Path(place).is_relative_to(folder / "environment"):
            raise PackagingError(f"expected biofx in the fresh environment, found {place}")
        _run([str(python.parent / "biofx"), "passes"], folder)
        summary = _run([str(python), *_DOCTESTS], folder).strip().splitlines()[-1]
    print(f"{sdist.name}, {wheel.name}: {summary.strip('= ')}")


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist from the tracked files, and the wheel from the sdist; return where they are.

    Args:
        folder: gets both, and what they are built from.

    Raises:
        PackagingError: one cannot be built.
    """
    source = folder / "source"
    for name in _run(["git", "ls-files"], ROOT).splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            (source / name).write_bytes((ROOT / name).read_bytes())
    sdist = _built("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, _built("wheel", unpacked, folder)


def _built(kind: str, source: Path, folder: Path) -> Path:
    command = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    return folder / _run([sys.executable, "-c", command], source).strip().splitlines()[-1]


def fresh_environment(folder: Path, wheel: Path, *others: str) -> Path:
    """Install a wheel into a new environment that has what it needs; return the Python of that.

    Args:
        folder: of the environment.
        wheel: what is installed.
        others: distributions that are there too, but for pytest, which always is.

    Raises:
        PackagingError: it cannot be installed, or needs what is not here.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    place = Path(
        _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    )
    required = metadata.PathDistribution(_metadata_of(wheel, folder)).requires or ()
    for name in sorted(_needed([*required, "pytest", *others])):
        distribution = metadata.distribution(name)
        for entry in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            aim = Path(str(distribution.locate_file(entry)))
            if aim.exists() and not (place / entry).exists():  # distributions may share a folder
                (place / entry).symlink_to(aim)
    own = [sys.executable, "-m", "pip", "--python", str(python)]
    # what it needs is there; pip would write other releases through the links, if its settings ask for some
    quietly = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    _run([*own, "install", *quietly, str(wheel)], folder)
    _run([*own, "check"], folder)
    return python


def _metadata_of(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        archive.extract(name, folder / "metadata")
    return (folder / "metadata" / name).parent


def _needed(requirements: Iterable[str]) -> set[str]:
    """Return the names of the distributions that requirements need here, with those that these need."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in found:
            found.add(requirement.name)
            waiting += metadata.distribution(requirement.name).requires or ()
    return found


def _run(command: list[str], folder: Path) -> str:
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=own)
    if done.returncode:
        raise PackagingError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    try:
        main()
    except PackagingError as error:
        sys.exit(str(error))
