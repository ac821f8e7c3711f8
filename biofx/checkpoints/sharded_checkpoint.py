"""Checkpoints that all ranks of a run write and read together, each its part, on any number of ranks.

A checkpoint is a folder of ``torch.distributed.checkpoint``. It holds tensors only: other values are JSON
text in one of them, since torch would unpickle anything else. torch unpickles the folder's index,
``.metadata``: load only folders that you trust.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.checkpoints.checkpoint import (
    Attachments,
    Optimizers,
    checkpoint_of,
    content_of,
    listed,
    transformed,
)
from biofx.checkpoints.checkpoint_file import FORMAT, SCHEMA, as_checkpoint_error, check_stamp, plain
from biofx.checkpoints.loading import check_same_making, load_into
from biofx.checkpoints.model_state import check_state, owners_of
from biofx.errors import CheckpointError
from biofx.model.rollback import unchanged_on_failure
from biofx.operators.parts import is_sharded
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.bio_state import PER_SYNAPSE
from biofx.plasticity.model_states import prepare_states
from biofx.plasticity.ranks import shard_states
from biofx.plasticity.shards import spread_like
from biofx.rewriting.record import TransformRecord

_SKELETON = "biofx"
"""Key of the tensor that holds, as text, all that is not a tensor."""
ResultT = TypeVar("ResultT")


def save_sharded(
    bio_model: nn.Module,
    folder: str | Path,
    *,
    optimizer: Optimizers = None,
    plasticity: Attachments = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save what :func:`biofx.save` saves, each rank its part; all ranks must call it.

    An older checkpoint in the folder is kept until the new one is complete: whenever a rank is killed, one of
    the two can be loaded. Other files in the folder stay; files of a save that was killed are removed.

    Args:
        bio_model: sharded as a whole (FSDP2), wrapped in DDP, or neither.
        folder: on a file system that all ranks see; a symlink is followed.
        optimizer: the optimizer, or several in a list.
        plasticity: the attachment that :func:`biofx.attach` returned, or several in a list.
        extra: numbers, texts, flags, lists and dicts of them.

    Raises:
        CheckpointError: as for :func:`biofx.save`, on this rank or on another.
    """
    from biofx.checkpoints.tensor_folder import write_tensors  # imports much of torch.distributed

    tensors: dict[str, Tensor] = {}

    def take_apart() -> None:
        content = content_of(bio_model, optimizer, plasticity, extra)
        stamped = {"format": FORMAT, "schema": SCHEMA, **content}
        skeleton = _flattened(plain(stamped, "the checkpoint", may_be_sharded=True), "", tensors)
        text = json.dumps(skeleton, ensure_ascii=True).encode()
        tensors[_SKELETON] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    on_all_ranks(take_apart)
    write_tensors(tensors, folder, _SKELETON)


def load_sharded(
    folder: str | Path,
    bio_model: nn.Module,
    *,
    optimizer: Optimizers = None,
    plasticity: Attachments = None,
) -> dict[str, Any]:
    """Load what :func:`save_sharded` saved, on any number of ranks; all of them must call it.

    Args:
        folder: the checkpoint.
        bio_model: transformed as the saved one was, and sharded, wrapped, or neither.
        optimizer: its optimizer, or several in a list, as saved.
        plasticity: what :func:`biofx.attach` returned, or several in a list, as saved.

    Returns:
        The values that were saved as ``extra``.

    Raises:
        CheckpointError: the folder cannot be read, is newer than this biofx, or does not fit the model, the
            optimizer or the attachment, on this rank or on another; nothing has been changed.
    """
    from biofx.checkpoints.tensor_folder import TensorFolder  # imports much of torch.distributed

    target = transformed(bio_model)
    optimizers, attachments = listed(optimizer, Optimizer), listed(plasticity, Attachment)
    opened = TensorFolder(folder)
    text = torch.empty_like(opened.sizes.get(_SKELETON, torch.empty(0)), device="cpu", dtype=torch.uint8)
    opened.read({_SKELETON: text})
    tensors: dict[str, Tensor] = {}

    def prepare() -> Any:
        try:
            skeleton = json.loads(bytes(text.tolist()))
            content = _restored(skeleton, opened.sizes)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{folder}: expected the content of a checkpoint, found {error!r}"
            ) from error
        check_stamp(content, folder)
        check_same_making(TransformRecord.from_json(content["record"]), target)
        prepare_states(target)
        shard_states(target)
        check_state(target, content["model"])
        tensors.update(_templates(target, skeleton, opened.sizes))
        return skeleton

    def take_over() -> Mapping[str, Any]:
        saved = checkpoint_of(_restored(skeleton, tensors), folder)
        load_into(saved, target, optimizers, attachments)
        shard_states(target)
        return saved.extra

    unfit = f"{folder}: expected a checkpoint that fits, found one that cannot be loaded"
    with unchanged_on_failure(target, *optimizers, *attachments), as_checkpoint_error(unfit):
        skeleton = on_all_ranks(prepare)
        opened.read(tensors)
        return dict(on_all_ranks(take_over))


def on_all_ranks(step: Callable[[], ResultT]) -> ResultT:
    """Take a step that needs no communication on all ranks; if it fails on one rank, it fails on all.

    Otherwise the other ranks would wait for the one that failed.

    Raises:
        CheckpointError: it failed on another rank. An exception on this rank is raised as it is.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return step()
    result: Any = None
    failure: Exception | None = None
    try:
        result = step()
    except Exception as error:
        failure = error
    failures: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(failures, None if failure is None else f"{type(failure).__name__}: {failure}")
    except RuntimeError as error:
        raise CheckpointError(
            f"expected an answer of all {len(failures)} ranks, found that one has ended: {error}"
        ) from (failure or error)
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message is not None:
            raise CheckpointError(f"rank {rank} of {len(failures)} failed: {message}")
    return result  # type: ignore[no-any-return]


def _flattened(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value in a form for JSON, with its tensors moved to ``tensors`` under their paths."""
    if isinstance(value, Tensor):
        while path in tensors:  # names may have slashes
            path += "/"
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, Mapping):
        entries = {key: _flattened(entry, f"{path}/{key}", tensors) for key, entry in value.items()}
        # JSON makes texts of numbers that are keys
        return {"dict": entries} if all(type(key) is str for key in value) else {"items": [*entries.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flattened(entry, f"{path}/{number}", tensors) for number, entry in enumerate(value)]}
    return value


def _restored(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that :func:`_flattened` was given."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, inner),) = skeleton.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _restored(entry, tensors) for key, entry in inner.items()}
    if kind == "items":
        return {key: _restored(entry, tensors) for key, entry in inner}
    entries = [_restored(entry, tensors) for entry in inner]
    return tuple(entries) if kind == "tuple" else entries


def _values(skeleton: Any) -> list[Any]:
    """Return the values of a flattened dict."""
    return [*skeleton["dict"].values()] if "dict" in skeleton else [entry for _, entry in skeleton["items"]]


def _templates(target: nn.Module, skeleton: Any, sizes: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield for each saved tensor one to read into, spread over the ranks as this model's parameters are."""
    parameters = dict(target.named_parameters(remove_duplicate=False))
    per_synapse = {
        prefix + name: state.weight
        for prefix, state in owners_of(target).items()
        if state.is_linked and state.parameter is not None
        for name in PER_SYNAPSE
    }
    content = skeleton["dict"]
    places = list(content["model"]["dict"].items())
    for optimizer in content["optimizers"]["list"]:
        for name, state in optimizer["dict"]["state"]["dict"].items():
            places += [(name, leaf) for leaf in _values(state)]
    for attachment in content["plasticity"]["list"]:
        for name, memory in attachment["dict"].get("memory", {"dict": {}})["dict"].items():
            places += [(name, leaf) for leaf in memory["dict"].values()]
    owner = {leaf["tensor"]: name for name, leaf in places if isinstance(leaf, dict) and "tensor" in leaf}
    for key, size in sizes.items():
        name = owner.get(key, "")
        like = per_synapse.get(name, parameters.get(name))
        if like is None or (like.shape != size.shape and name not in per_synapse):
            yield key, torch.empty(size.shape, dtype=size.dtype)
        elif is_sharded(like):
            yield key, spread_like(torch.zeros((), dtype=size.dtype).expand(size.shape), like)
        else:
            yield key, torch.empty(size.shape, dtype=size.dtype, device=like.device)
