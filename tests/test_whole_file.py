from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from biofx.whole_file import create_locked, whole_file


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


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
    (left,) = set(names(tmp_path)) - {"file"}
    assert left.startswith(".file.")
    others = [
        ".file.0123abcd",
        ".file.0123abcd.unfinished.txt",
        ".other.0123abcd.unfinished",
        ".file.tmp",
        "file~",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"somebody else's")
    going_on, held = create_locked(tmp_path, "file")
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == sorted([*others, going_on.name, "file"])
    held.close()
    write(path, b"newer")
    assert names(tmp_path) == sorted([*others, "file"])


@pytest.mark.parametrize("name", ["x" * 200, "名" * 70, "größe.pt", ".hidden", "a b\nc", "[x](y)*?.pt"])
def test_any_name_that_a_file_can_have(name: str, tmp_path: Path) -> None:
    left, held = create_locked(tmp_path, name.encode()[:80].decode("utf-8", "ignore"))
    held.close()
    write(tmp_path / name, b"content")
    assert names(tmp_path) == [name]
    assert not left.exists()


def test_a_symlink_is_followed_and_stays(tmp_path: Path) -> None:
    for folder in ("store", "links"):
        (tmp_path / folder).mkdir()
    target, link, second = tmp_path / "store" / "run-3", tmp_path / "links" / "latest", tmp_path / "second"
    link.symlink_to("../store/run-3")  # to nothing yet, and as seen from where it lies
    second.symlink_to(link)
    for content in (b"first", b"second"):
        write(second, content)
        assert target.read_bytes() == link.read_bytes() == content
        assert link.is_symlink()
        assert second.is_symlink()
        assert not target.is_symlink()
    assert names(tmp_path / "store") == ["run-3"]
    assert names(tmp_path / "links") == ["latest"]
    lost = tmp_path / "lost"
    lost.symlink_to(tmp_path / "missing" / "file")
    with pytest.raises(FileNotFoundError), whole_file(lost):
        raise AssertionError
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(OSError, match="symbolic links"), whole_file(circle):
        raise AssertionError
    assert circle.is_symlink()


def test_the_file_is_on_the_disk_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def replace(source: Any, target: Any, rename: Any = os.replace) -> None:
        done.append("name")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "file", b"content")
    assert done == ["file", "name", "folder"]


def test_several_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([number]) * 5000 for number in range(4)]
    failed: list[BaseException] = []

    def writing(content: bytes) -> None:
        try:
            for _ in range(40):
                write(path, content)
                assert path.read_bytes() in contents
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=writing, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert names(tmp_path) == ["file"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"content")
    reader.join()
    assert found == [b"content"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["pipe"]
