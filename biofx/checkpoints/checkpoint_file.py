"""Checkpoint files: plain values and tensors, with every byte checked before a value is used.

A file is a zip archive of ``torch.save``, which ``torch.load(path, weights_only=True)`` reads: it holds no
code. torch does not check the archive's checksums when it loads (of 400 files with one bit flipped, it read
299 without an error), so they are checked here; before that the sizes of the entries are checked, so that a
small file cannot fill the memory.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biofx.errors import BiofxError, CheckpointError, PlasticityError
from biofx.operators.parts import is_sharded
from biofx.plasticity.saved_state import refuse_codes
from biofx.whole_file import whole_file

FORMAT = "biofx.checkpoint"
SCHEMA = 1
"""Increased when a key changes its meaning or disappears."""

_SCALARS: tuple[type, ...] = (bool, int, float, str)
_LEAST_HEADER = 30
"""Size of an entry's header without its name, bytes."""
_DEEPEST = 100
"""Depth to which values may be nested, a count."""


@contextmanager
def as_checkpoint_error(doing: str, *, but: type[BiofxError] = CheckpointError) -> Iterator[None]:
    """Turn any exception, for example of a user's class, into a ``CheckpointError``.

    Args:
        doing: the beginning of its message.
        but: a class of errors that are raised as they are, like warnings that are errors.

    Raises:
        CheckpointError: from any other exception.
    """
    try:
        yield
    except (but, CheckpointError, Warning):
        raise
    except Exception as error:
        kind = "" if isinstance(error, BiofxError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{doing}: {kind}{cause_of(error)}") from error


def write_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write plain values and tensors, completely or not at all.

    Raises:
        CheckpointError: a value is not plain, or the file cannot be written; an older file is not changed.
    """
    stamped = plain({"format": FORMAT, "schema": SCHEMA, **content}, "the checkpoint")
    try:
        with with_checksums(), whole_file(path) as file:
            torch.save(stamped, file)
    except Exception as error:  # torch's writer raises other errors for a full disk
        raise CheckpointError(f"cannot write {path}: {cause_of(error)}") from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what :func:`write_checkpoint` wrote, with tensors on the CPU, without running code in the file.

    Raises:
        CheckpointError: the file cannot be read, is damaged or truncated, is no checkpoint of biofx, or was
            written by a newer biofx.
    """
    try:
        check_archive(path)
        with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants():
            # torch 2.13 checks sparse tensors if it is asked to, and 2.15 in any case, but says so each time
            warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except Exception as error:  # a damaged or hostile file can make the readers raise anything
        raise CheckpointError(
            f"{path}: expected a checkpoint that biofx.save wrote, found a file that is damaged or of "
            f"another kind ({type(error).__name__}: {_in_one_line(error)}); use an older copy"
        ) from error
    check_stamp(content, path)
    checked: dict[str, Any] = plain(content, f"{path}")
    return checked


def check_archive(file: Any) -> None:
    """Check every byte of an archive that ``torch.save`` wrote, which ``torch.load`` does not do.

    Args:
        file: a path, or an open file.

    Raises:
        BadZipFile: it is damaged, or an entry claims a wrong size.
        OSError: it cannot be read.
    """
    with zipfile.ZipFile(file) as archive:
        _check_entries(archive)
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged!r}")


@contextmanager
def with_checksums() -> Iterator[None]:
    """Make ``torch.save`` write checksums, even if they are switched off."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _check_entries(archive: zipfile.ZipFile) -> None:
    """Check that entries are not compressed and do not overlap, before any is read.

    Raises:
        BadZipFile: one is compressed, overlaps another, or reaches beyond the file.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    ends = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
    names: set[str] = set()
    for entry, end in zip(entries, ends, strict=True):
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise zipfile.BadZipFile(f"{entry.filename!r} is compressed, which torch.save never does")
        if entry.header_offset + _LEAST_HEADER + entry.file_size > end:
            raise zipfile.BadZipFile(f"{entry.filename!r} claims to be larger than its place in the file")
        # torch's reader takes an entry with the attribute of a folder for empty and reads nothing into it
        if entry.external_attr or entry.filename in names:
            raise zipfile.BadZipFile(f"{entry.filename!r} has wrong attributes, or is there twice")
        names.add(entry.filename)


def check_stamp(content: Any, path: str | Path) -> None:
    """Check that something is a checkpoint of biofx that this version understands.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint that biofx.save wrote, found another file of torch.save; "
            "load a plain state dict with bio_model.load_state_dict"
        )
    schema = content.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise CheckpointError(
            f"{path}: expected schema {SCHEMA} or older, found {schema!r}, written by biofx "
            f"{content.get('biofx')}; upgrade biofx"
        )
    try:
        refuse_codes(content["model"] if isinstance(content.get("model"), dict) else {})
    except PlasticityError as error:
        raise CheckpointError(f"{path}: {error}") from error


def plain(value: Any, where: str, *, may_be_sharded: bool = False) -> Any:
    """Return a value in plain types: dicts, lists, tuples, numbers, texts, flags, None, and tensors.

    Args:
        value: any value.
        where: its name in messages.
        may_be_sharded: whether tensors may be spread over ranks; they stay so.

    Raises:
        CheckpointError: it is or holds something else, or a tensor without values; the message says where.
    """
    return _Plain(may_be_sharded).made(value, where, 0)


class _Plain:
    """Makes values plain; a value in several places is converted once."""

    def __init__(self, may_be_sharded: bool) -> None:
        self._may_be_sharded = may_be_sharded
        self._made: dict[int, tuple[Any, Any]] = {}

    def made(self, value: Any, where: str, depth: int) -> Any:
        if value is None or type(value) in _SCALARS:
            return value
        if depth > _DEEPEST:
            raise CheckpointError(
                f"{where[:80]}…: expected at most {_DEEPEST} values within each other, found more, or a "
                "value that holds itself"
            )
        if id(value) not in self._made:
            self._made[id(value)] = value, self._of(value, where, depth)
        return self._made[id(value)][1]

    def _of(self, value: Any, where: str, depth: int) -> Any:
        if type(value) in (Tensor, nn.Parameter) or (self._may_be_sharded and is_sharded(value)):
            _check_values(value, where)
            return _compact(value.detach())
        if isinstance(value, Mapping):
            for key in value:
                if type(key) not in (str, int):
                    raise CheckpointError(
                        f"{where}: expected keys that are texts or whole numbers, found {key!r}"
                    )
            return {key: self.made(entry, f"{where}[{key!r}]", depth + 1) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            entries = [
                self.made(entry, f"{where}[{number}]", depth + 1) for number, entry in enumerate(value)
            ]
            return tuple(entries) if isinstance(value, tuple) else entries
        for kind in _SCALARS[1:]:  # NumPy's numbers are numbers too
            if isinstance(value, kind):
                return kind(value)
        raise CheckpointError(
            f"{where}: expected plain values and tensors, which can be loaded without running code, found a "
            f"{type(value).__name__}"
            + ("; save a sharded model with biofx.checkpoints.save_sharded" if is_sharded(value) else "")
        )


def _check_values(tensor: Tensor, where: str) -> None:
    """Refuse a tensor on the meta device, or one whose memory was freed."""
    empty = tensor.is_meta
    if not empty and tensor.layout == torch.strided and not is_sharded(tensor) and tensor.numel():
        empty = tensor.untyped_storage().nbytes() == 0
    if empty:
        raise CheckpointError(
            f"{where}: expected a tensor with values, found one without (on the {tensor.device.type} "
            "device); load values into the model first: to_empty(device=...) and load_state_dict"
        )


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor without the rest of a larger storage."""
    if tensor.layout != torch.strided or is_sharded(tensor):
        return tensor
    own = tensor.numel() * tensor.element_size()
    return tensor.clone() if tensor.untyped_storage().nbytes() > own else tensor


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def cause_of(error: BaseException) -> str:
    """Return the message of an error, or of the system's error that caused it."""
    within: BaseException | None = error
    while within is not None and not isinstance(within, OSError):
        within = within.__cause__ or within.__context__
    return _in_one_line(error if within is None else within)
