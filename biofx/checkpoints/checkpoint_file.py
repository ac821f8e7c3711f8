"""Checkpoint files: plain values and tensors, checked to the last byte before anything is made of them.

A file is a zip archive as ``torch.save`` writes it, and ``torch.load(path, weights_only=True)`` reads it: no
code is stored and none is run. torch itself does not look at the archive's checksums when it loads (of 400
files with one bit turned over, it read 299 as if nothing were wrong), so they are checked here.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biofx.errors import CheckpointError
from biofx.whole_file import whole_file

FORMAT = "biofx.checkpoint"
SCHEMA = 1
"""Goes up when a key changes its meaning or disappears."""

_SCALARS: tuple[type, ...] = (bool, int, float, str)


def write_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write plain values and tensors, whole or not at all.

    Raises:
        CheckpointError: a value is not plain, or the file cannot be written; an older file is left as it was.
    """
    stamped = plain({"format": FORMAT, "schema": SCHEMA, **content}, "the checkpoint")
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with whole_file(path) as file:
            torch.save(stamped, file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        torch.serialization.set_crc32_options(checksums)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what :func:`write_checkpoint` wrote, tensors on the CPU. No code of the file's is run.

    Raises:
        CheckpointError: the file cannot be read, is damaged or truncated, is no checkpoint of biofx, or was
            written by a newer biofx.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch's reader takes an entry with the attribute of a folder for empty and reads nothing into it
            folders = (entry.filename for entry in archive.infolist() if entry.external_attr)
            damaged = next(folders, None) or archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum or attributes of {damaged!r}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except Exception as error:  # a damaged or hostile file can make the readers raise anything
        raise CheckpointError(
            f"{path}: expected a whole checkpoint that biofx.save wrote, found a file that is damaged or "
            f"something else ({type(error).__name__}: {_first_line(error)}); use an older copy"
        ) from error
    check_stamp(content, path)
    checked: dict[str, Any] = plain(content, f"{path}")
    return checked


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


def plain(value: Any, where: str) -> Any:
    """Return a value in plain types: dicts, lists, tuples, numbers, texts, flags, None, and tensors.

    Raises:
        CheckpointError: it is, or holds, something else; the message says where.
    """
    if value is None or type(value) in _SCALARS:
        return value
    if type(value) in (Tensor, nn.Parameter):
        return _compact(value.detach())
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"{where}: expected keys that are texts or whole numbers, found {key!r}"
                )
        return {key: plain(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [plain(entry, f"{where}[{number}]") for number, entry in enumerate(value)]
        return tuple(entries) if isinstance(value, tuple) else entries
    for kind in _SCALARS[1:]:  # NumPy's numbers are numbers too
        if isinstance(value, kind):
            return kind(value)
    raise CheckpointError(
        f"{where}: expected plain values and tensors, which can be loaded without running code, found a "
        f"{type(value).__name__}" + _hint(value)
    )


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor that does not bring along a larger storage that it is a part of."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return tensor
    own = tensor.numel() * tensor.element_size()
    return tensor.clone() if tensor.untyped_storage().nbytes() > own else tensor


def _hint(value: Any) -> str:
    if isinstance(value, Tensor) and hasattr(value, "device_mesh"):
        return "; a sharded model is saved by all ranks together, with biofx.save_sharded"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
