"""Runs that are finished: a file each, which says what was run and what it found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import biofx
from biofx.errors import InputError
from biofx.toml import write_whole
from reproduce.experiment import Job, Measured


@dataclass(frozen=True)
class Result:
    """A job and what it found."""

    job: Job
    found: Measured


class Results:
    """A folder with one file per finished run. A file is there whole or not at all.

    Raises:
        InputError: the folder cannot be made, or (by its methods) a file in it is of something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error

    def find(self, job: Job) -> Result | None:
        """Return what a finished run found, None if it is not finished."""
        path = self.folder / job.file_name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = Measured(**content["found"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no result: {error!r}; delete it, and it will be run again"
            ) from error
        expected = _label(job)
        if {key: content.get(key) for key in expected} != expected:
            raise InputError(
                f"{path}: expected a result of {expected['job']} with {_versions()}, found one of "
                f"{content.get('job')} with {content.get('versions')}; delete it, or choose another folder"
            )
        return Result(job, found)

    def keep(self, result: Result) -> None:
        """Write a result's file."""
        content = {**_label(result.job), "found": asdict(result.found)}
        write_whole(self.folder / result.job.file_name, json.dumps(content) + "\n")

    def find_all(self, jobs: Iterable[Job]) -> list[Result] | None:
        """Return the results of jobs in their order, None if some are not finished."""
        found = []
        for job in jobs:
            result = self.find(job)
            if result is None:
                return None
            found.append(result)
        return found


def _versions() -> dict[str, str]:
    return {"biofx": biofx.__version__, "torch": torch.__version__}


def _label(job: Job) -> dict[str, Any]:
    # as JSON gives it back
    return {"job": {**asdict(job), "lengths": dict(job.lengths)}, "versions": _versions()}
