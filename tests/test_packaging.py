from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import rich

from biofx._version import __version__
from package import build, fresh_environment

ROOT = Path(__file__).parent.parent


def test_passes_refuse_to_be_imported_as_a_top_level_module() -> None:
    found = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1
    assert "from biofx import passes" in found.stderr


def test_passes_are_the_same_modules_under_both_folders() -> None:
    link = ROOT / "biofx" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"


def test_wheel_and_sdist_hold_the_package_and_no_module_called_passes(tmp_path: Path) -> None:
    sdist, wheel = build(tmp_path)  # the one from the other; python tools/package.py installs it
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in tracked.stdout.splitlines() if (ROOT / name).exists()]
    modules = [name for name in files if re.fullmatch(r"(biofx|passes)/.*\.py", name)]
    data = {name for name in files if name.startswith("biofx/rewriting/views/page/")}
    assert len(data) > 2
    wanted = {re.sub("^passes/", "biofx/passes/", name) for name in modules} | data | {"biofx/py.typed"}
    assert len(wanted) > 50
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wanted <= set(names)
    assert {name.split("/")[0] for name in names} == {"biofx", f"biofx-{__version__}.dist-info"}
    with tarfile.open(sdist) as source:
        names = [name.partition("/")[2] for name in source.getnames()]
    assert {name.replace("biofx/passes/", "passes/") for name in wanted} | {"LICENSE"} <= set(names)


def test_a_fresh_environment_never_writes_through_its_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its settings ask for another release of what is linked, pip would install that at the link."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("rich==0.1\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(constraints))
    _, wheel = build(tmp_path)
    python = fresh_environment(tmp_path / "environment", wheel)
    (linked,) = python.parent.parent.glob("lib/*/site-packages/rich")
    assert linked.is_symlink()
    assert linked.resolve() == Path(rich.__file__).parent
