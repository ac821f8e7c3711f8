"""Files that are replaced in one step, so that a reader never sees a part of one.

A file is written under a hidden name beside its target, and locked by the process that writes it. A process
that is killed loses its locks, so the next one recognizes the files that it left.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

_LONGEST = 80
"""Length of the part of a target's name that the hidden name repeats, bytes; a name has at most 255."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it replaces the old one only once it is completely on the disk.

    A symlink is followed and kept; a device or a pipe is written to directly. A process that is killed while
    it writes leaves the old file, and a hidden one beside it that the next process to write there removes.

    Raises:
        OSError: the file cannot be written.
        ValueError: the path is invalid.
    """
    target = followed(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        with open(target, "wb") as device:
            yield device
        return
    stem = target.name.encode("utf-8", "surrogateescape")[:_LONGEST].decode("utf-8", "ignore")
    with _as_of(path):
        remove_abandoned(target.parent, stem)
        unfinished, file = create_locked(target.parent, stem)
    try:
        yield file
        with _as_of(path):
            file.flush()
            os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, unfinished)
            if sys.platform == "win32":
                file.close()  # an open file cannot be renamed there
            os.replace(unfinished, target)
            sync_folder(target.parent)
    finally:
        with suppress(OSError):  # after another error, as of a full disk
            file.close()
        with suppress(OSError):
            unfinished.unlink()


@contextmanager
def _as_of(path: str | Path) -> Iterator[None]:
    """Let the system's errors name the file that was asked for, not the one that is written first."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


def followed(path: str | Path) -> Path:
    """Return the target of a path with all symlinks followed; it need not exist.

    Raises:
        OSError: they lead in a circle.
        ValueError: the path is invalid.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def create_locked(folder: Path, stem: str) -> tuple[Path, BinaryIO]:
    """Create a hidden file, which is locked while it is open.

    Args:
        folder: of the file.
        stem: the beginning of its name, by which :func:`remove_abandoned` finds it.

    Raises:
        OSError: it cannot be created.
    """
    while True:
        path = folder / f".{stem}.{secrets.token_hex(4)}.unfinished"
        file = open(path, "xb")  # noqa: SIM115
        _lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # another process removed it before it was locked


def remove_abandoned(folder: Path, stem: str) -> list[Path]:
    """Remove the hidden files that :func:`create_locked` made in processes that have ended.

    Returns:
        The files whose process is running, or may be.
    """
    kind = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{8}}\.unfinished")
    in_use = []
    try:
        found = [entry for entry in folder.iterdir() if kind.fullmatch(entry.name)]
    except OSError:  # writing there will raise it again
        return []
    for path in found:
        if path.is_file() and not path.is_symlink() and not _is_removed(path):
            in_use.append(path)
    return in_use


def _is_removed(path: Path) -> bool:
    """Remove a hidden file if no process holds its lock; return whether it is gone."""
    try:
        with open(path, "r+b") as file:
            if _lock(file, wait=False):
                path.unlink()
                return True
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _lock(file: BinaryIO, *, wait: bool) -> bool:
    """Lock an open file if it can be, and return whether it is."""
    if sys.platform == "win32":
        return True  # a file that another process has open cannot be removed there
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has the lock, or the file system has no locks
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, if the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
