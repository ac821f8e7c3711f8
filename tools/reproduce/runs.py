"""Single runs of the grid: what names one, what it finds, and the file that says it is finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import biofx
from biofx.errors import InputError
from biofx.toml import write_whole
from reproduce.arms import ARMS, build
from reproduce.data import Data
from reproduce.networks import NETWORKS
from reproduce.training import train


@dataclass(frozen=True)
class Job:
    """One run of the grid; equal jobs find equal numbers."""

    dataset: str
    network: str
    arm: str
    rate: float
    seed: int
    epochs: int

    @property
    def file_name(self) -> str:
        """Where its result is kept, in the folder of results."""
        parts = [self.dataset, self.network, self.arm, f"{self.rate:g}", str(self.seed), str(self.epochs)]
        return "_".join(part.replace(" ", "-") for part in parts) + ".json"


@dataclass(frozen=True)
class Result:
    """What a run found."""

    job: Job
    parameters: int
    """Trainable numbers of the network, a count."""
    validation: float
    """Accuracy, in percent."""
    test: float
    """Accuracy, in percent."""


def execute(job: Job, load: Callable[[int], Data]) -> Result:
    """Train the job's network; the global random state is as before."""
    data, arm = load(job.seed), ARMS[job.arm]
    model, observers = build(arm, lambda: NETWORKS[job.network].make(data.shape), job.seed)
    validation, test = train(
        model,
        data,
        rate=job.rate,
        epochs=job.epochs,
        seed=job.seed,
        rules=arm.rules,
        observers=observers,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Result(job, parameters, validation, test)


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
            result = Result(job, content["parameters"], content["validation"], content["test"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no result: {error!r}; delete it, and it will be run again"
            ) from error
        if content != _content(result):
            raise InputError(
                f"{path}: expected a result of {_content(result)['job']} with {_versions()}, found one of "
                f"{content.get('job')} with {content.get('versions')}; delete it, or choose another folder"
            )
        return result

    def keep(self, result: Result) -> None:
        """Write a result's file."""
        write_whole(self.folder / result.job.file_name, json.dumps(_content(result), indent=2) + "\n")

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


def _content(result: Result) -> dict[str, Any]:
    return {**asdict(result), "versions": _versions()}
