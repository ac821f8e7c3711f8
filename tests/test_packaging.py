from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from biofx._version import __version__

ROOT = Path(__file__).parent.parent


def test_passes_refuse_to_be_imported_as_a_top_level_module() -> None:
    found = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1
    assert "from biofx import passes" in found.stderr


def test_passes_are_the_same_modules_under_both_folders() -> None:
    link = ROOT / "biofx" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == "../passes"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_wheel_and_sdist_hold_the_package_and_no_module_called_passes(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to(os.readlink(ROOT / name))
        else:
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", command], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = tmp_path / done.stdout.strip().splitlines()[-1]
    modules = [name for name in tracked.stdout.splitlines() if re.fullmatch(r"(biofx|passes)/.*\.py", name)]
    data = {name for name in tracked.stdout.splitlines() if name.startswith("biofx/rewriting/views/page/")}
    assert len(data) > 2
    wanted = {re.sub("^passes/", "biofx/passes/", name) for name in modules} | data | {"biofx/py.typed"}
    assert len(wanted) > 50
    if kind == "wheel":
        with zipfile.ZipFile(built) as wheel:
            names = wheel.namelist()
        assert wanted <= set(names)
        assert {name.split("/")[0] for name in names} == {"biofx", f"biofx-{__version__}.dist-info"}
    else:
        with tarfile.open(built) as sdist:
            names = [name.partition("/")[2] for name in sdist.getnames()]
        assert {name.replace("biofx/passes/", "passes/") for name in wanted} | {"LICENSE"} <= set(names)
