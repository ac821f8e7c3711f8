"""Steps that all ranks of a run take, or none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from biofx.errors import CheckpointError

ResultT = TypeVar("ResultT")


def on_all_ranks(step: Callable[[], ResultT]) -> ResultT:
    """Take a step that asks nothing of other ranks; where it fails on one, it fails on all of them.

    Without this, the others would go on to wait for the one that has failed.

    Raises:
        CheckpointError: it failed on another rank. What it raises here is raised here.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return step()
    result: Any = None
    failure: Exception | None = None
    try:
        result = step()
    except Exception as error:
        failure = error
    told: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(told, None if failure is None else f"{type(failure).__name__}: {failure}")
    except RuntimeError as error:
        raise CheckpointError(
            f"expected an answer of all {len(told)} ranks, found that one is gone: {error}"
        ) from (failure or error)
    if failure is not None:
        raise failure
    for rank, message in enumerate(told):
        if message is not None:
            raise CheckpointError(f"rank {rank} of {len(told)} failed, and with it all others: {message}")
    return result  # type: ignore[no-any-return]
