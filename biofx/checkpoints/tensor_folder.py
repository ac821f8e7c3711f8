"""Folders of ``torch.distributed.checkpoint`` that hold tensors only; importing that takes seconds.

A folder that is written again holds the old tensors until the new ones are complete: each save uses new names
of files, the index is replaced last, in one step, and then files that it no longer names are removed. Files
of a save that was killed are removed by the next one.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from biofx.checkpoints.checkpoint_file import cause_of, check_archive, with_checksums
from biofx.errors import CheckpointError
from biofx.whole_file import create_locked, followed, remove_abandoned, sync_folder, whole_file

_INDEX = ".metadata"
_OURS = re.compile(r"__\d+_([0-9a-f]{8})_\d+\.distcp")
"""Names of files that we write, with the number of the save; torch's own names have none."""
_ANY = re.compile(rb"__\d+_(?:[0-9a-f]{8}_)?\d+\.distcp")
_STEM = "biofx-save"


def write_tensors(tensors: dict[str, Tensor], folder: str | Path, mark: str) -> None:
    """Write tensors, each rank what it has; all ranks must call it.

    Args:
        tensors: by their keys.
        folder: its content is kept until all has been written.
        mark: a key that only folders written by this function have.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _explained(f"{folder}: expected a folder to write to"):
        writer = _Writer(followed(folder), mark)
        try:
            save(tensors, storage_writer=writer)
        finally:
            writer.close()


class TensorFolder:
    """The state of a folder when it was opened, the same on all ranks; all of them must call its methods."""

    def __init__(self, folder: str | Path) -> None:
        """Read the index, on one rank for all.

        Raises:
            CheckpointError: the folder holds no tensors.
        """
        self._folder = folder
        self.sizes: dict[str, Tensor] = {}
        """For each tensor in the folder, one on the meta device."""
        with self._reading():
            self._metadata: Metadata = pickle.loads(_index_for_all(Path(folder)))
            for key, entry in self._metadata.state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata):
                    self.sizes[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors with those in the folder under the same keys.

        Raises:
            CheckpointError: the folder is damaged, lacks one of them, or has been written again since.
        """
        with self._reading():
            load(tensors, storage_reader=_Reader(Path(self._folder), self._metadata))

    def _reading(self) -> Any:
        return _explained(f"{self._folder}: expected a folder that biofx.checkpoints.save_sharded wrote")


class _Writer(FileSystemWriter):
    """Writes files under new names; the coordinator replaces the index and removes old files."""

    def __init__(self, folder: Path, mark: str) -> None:
        super().__init__(folder)
        self._folder = folder
        self._mark = mark.encode()
        self._claim: tuple[Path, BinaryIO] | None = None
        self._replaced: set[str] = set()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Lock a number for the save, and put it into the names of each rank's files."""
        self._claim = create_locked(self._folder, _STEM)
        index = _read_index(self._folder)
        self._replaced = _named_in(index) if self._mark in index else set()
        self._clean(set())
        number = _number_of(self._claim[0])
        made = super().prepare_global_plan(plans)
        for plan in made:
            plan.storage_data.prefix += f"{number}_"
        return made

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part.

        Raises:
            OSError: it cannot be written, with the cause, which torch's writer may hide from other ranks.
        """
        try:
            with with_checksums():
                return super().write_data(plan, planner)
        except Exception as error:
            raise OSError(cause_of(error)) from error

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Replace the index, then remove the files that only the old one named."""
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = self.storage_meta()
        sync_folder(self._folder)
        with whole_file(self._folder / _INDEX) as file:
            pickle.dump(metadata, file)
        self._clean(self._replaced)

    def close(self) -> None:
        """Unlock the number, and remove the files with it if no index names them."""
        if self._claim is None:
            return
        path, file = self._claim
        self._claim = None
        self._clean(set(), {_number_of(path)})
        with suppress(OSError):
            path.unlink()
        file.close()

    def _clean(self, replaced: set[str], ended: set[str] | None = None) -> None:
        """Remove files that the index does not name, except those of saves in progress.

        Args:
            replaced: names in an earlier index of ours.
            ended: numbers of saves that are over, though their locks are still held.
        """
        with suppress(OSError):  # the next save tries again
            # in this order: a listed file belongs to a save that began before, and is in the index once over
            listed = [entry.name for entry in self._folder.iterdir()]
            in_progress = {_number_of(path) for path in remove_abandoned(self._folder, _STEM)}
            named = _named_in(_read_index(self._folder))
            for name in listed:
                ours = _OURS.fullmatch(name)
                number = "" if ours is None else ours.group(1)
                over = number in (ended or ()) or number not in in_progress if number else name in replaced
                if over and name not in named:
                    (self._folder / name).unlink()


class _Reader(FileSystemReader):
    """Checks and reads the files that one index names, even if the folder has another index now."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._folder = folder
        self._metadata = metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's part.

        Raises:
            BadZipFile: a tensor of it is damaged.
        """
        for place in {
            item.storage_index: self.storage_data[item.storage_index] for item in plan.items
        }.values():
            with open(self._folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                check_archive(io.BytesIO(file.read(place.length)))
        return super().read_data(plan, planner)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        return self._metadata


def _number_of(claim: Path) -> str:
    return claim.name.split(".")[-2]


def _read_index(folder: Path) -> bytes:
    """Return the bytes of the index, empty without one."""
    try:
        return (folder / _INDEX).read_bytes()
    except FileNotFoundError:
        return b""


def _named_in(index: bytes) -> set[str]:
    """Return the names of files in an index, without unpickling it, which might run code."""
    return {name.decode() for name in _ANY.findall(index)}


def _index_for_all(folder: Path) -> bytes:
    """Return the index that the first rank finds; another rank might find another one.

    Raises:
        OSError: the first rank cannot read it.
    """
    together = dist.is_available() and dist.is_initialized()
    found: list[Any] = [None]
    if not together or dist.get_rank() == 0:
        try:
            found = [(folder / _INDEX).read_bytes()]
        except OSError as error:
            found = [error]
    if together:
        dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], OSError):
        raise found[0]
    return bytes(found[0])


@contextmanager
def _explained(expected: str) -> Iterator[None]:
    """Turn any exception into one clear error, and ignore torch's warnings about a single process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
            yield
    except CheckpointException as error:
        found = {rank: failure for rank, (failure, _) in error.failures.items()}
        interrupts = [failure for failure in found.values() if not isinstance(failure, Exception)]
        if interrupts:
            raise interrupts[0] from error
        causes = "; ".join(f"rank {rank}: {_in_short(failure)}" for rank, failure in found.items())
        raise CheckpointError(f"{expected}, found something else ({causes})") from error
    except Exception as error:
        raise CheckpointError(f"{expected}, found something else ({_in_short(error)})") from error


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
