from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from biofx.whole_file import whole_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"first")
    path.chmod(0o640)
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(bytes(1 // (file.write(b"half") - 4)))
    assert path.read_bytes() == b"first"
    with whole_file(path) as file:
        file.write(b"second")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    source = (
        "import importlib.util, os, signal, sys\n"
        "spec = importlib.util.spec_from_file_location('whole_file', sys.argv[2])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "with module.whole_file(sys.argv[1]) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    module = str(Path(__file__).parent.parent / "biofx" / "whole_file.py")
    done = subprocess.run([sys.executable, "-c", source, str(path), module])
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
