"""Folders of ``torch.distributed.checkpoint`` that hold tensors only; to import it takes torch seconds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from biofx.errors import CheckpointError


def write_tensors(tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Write tensors, each rank what it has; all ranks must call it.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _explained(f"{folder}: expected a folder to write to"):
        save(tensors, checkpoint_id=str(folder))


def read_tensors(tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Fill tensors with what a folder holds under their names; all ranks must call it.

    Raises:
        CheckpointError: the folder is damaged or lacks one of them.
    """
    with _explained(f"{folder}: expected a folder that biofx.save_sharded wrote"):
        load(tensors, checkpoint_id=str(folder))


def sizes_in(folder: str | Path) -> dict[str, Tensor]:
    """Return for each tensor in a folder one without values.

    Raises:
        CheckpointError: it is no such folder.
    """
    with _explained(f"{folder}: expected a folder that biofx.save_sharded wrote"):
        metadata = FileSystemReader(str(folder)).read_metadata()
        return {
            key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }


@contextmanager
def _explained(expected: str) -> Iterator[None]:
    """Let whatever goes wrong be one clear error; one process by itself is not warned that it is alone."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        raise CheckpointError(
            f"{expected}, found something else ({type(error).__name__}: {str(error)[:200]})"
        ) from error
