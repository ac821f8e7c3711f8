"""Files that a reader sees as they were or as they are meant to be, never in part.

What is still being written has a hidden name beside its target, and is locked by the process that writes it.
A process that is killed loses its locks: by that the next one knows what nobody is going to finish.
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
"""Bytes of a target's name that the hidden name repeats; a name has at most 255."""


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing; its name leads to the new content only once all of it is on the disk.

    A symlink is followed, and stays; a device or a pipe is written to as it is. A process that is killed on
    the way leaves the old file as it was, and a hidden one beside it that the next to write there removes.

    Raises:
        OSError: the file cannot be written.
        ValueError: the path is not one.
    """
    target = followed(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        with open(target, "wb") as device:
            yield device
        return
    stem = target.name.encode("utf-8", "surrogateescape")[:_LONGEST].decode("utf-8", "ignore")
    remove_abandoned(target.parent, stem)
    unfinished, file = create_locked(target.parent, stem)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, unfinished)
        if sys.platform == "win32":
            file.close()  # what is open cannot be renamed there
        os.replace(unfinished, target)
        sync_folder(target.parent)
    finally:
        with suppress(OSError):  # it repeats what has failed before: a full disk
            file.close()
        with suppress(OSError):
            unfinished.unlink()


def followed(path: str | Path) -> Path:
    """Return where a path leads when all symlinks are followed; the last of them may lead to nothing yet.

    Raises:
        OSError: they lead in a circle.
        ValueError: the path is not one.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def create_locked(folder: Path, stem: str) -> tuple[Path, BinaryIO]:
    """Create a hidden file, which is locked for as long as it is open.

    Args:
        folder: where to.
        stem: what its name begins with, for :func:`remove_abandoned` to know it by.

    Raises:
        OSError: it cannot be created.
    """
    while True:
        path = folder / f".{stem}.{secrets.token_hex(4)}.unfinished"
        file = open(path, "xb")  # noqa: SIM115
        _lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # another process took it for abandoned before it was locked


def remove_abandoned(folder: Path, stem: str) -> list[Path]:
    """Remove the hidden files that :func:`create_locked` made for processes that have ended since.

    Returns:
        The others: those whose process goes on, or is not known to have ended.
    """
    kind = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{8}}\.unfinished")
    in_use = []
    try:
        found = [entry for entry in folder.iterdir() if kind.fullmatch(entry.name)]
    except OSError:  # whoever wants to write there will learn why
        return []
    for path in found:
        if path.is_file() and not path.is_symlink() and not _is_removed(path):
            in_use.append(path)
    return in_use


def _is_removed(path: Path) -> bool:
    """Remove a hidden file if no process holds its lock, and return whether that was so."""
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
        return True  # what another process has open cannot be removed there
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody else's, or the file system knows no locks
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system has a way to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
