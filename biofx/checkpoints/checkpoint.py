"""What a checkpoint holds, and how a model is saved as one.

A checkpoint holds how the model was made, its state, the options of each weight's rules, and optionally the
state of optimizers and attachments, and values of the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.checkpoints.checkpoint_file import as_checkpoint_error, read_checkpoint, write_checkpoint
from biofx.checkpoints.optimizer_state import optimizer_state
from biofx.errors import BiofxError, CheckpointError, InputError
from biofx.model.called_again import lines_as_transformed
from biofx.model.graph_module import BioGraphModule
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.model_states import bio_modules, unwrapped
from biofx.rewriting.plain_passes import config_to_plain
from biofx.rewriting.record import TransformRecord, record_of

Optimizers = Optimizer | Sequence[Optimizer] | None
Attachments = Attachment | Sequence[Attachment] | None


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file, not yet loaded into a model."""

    record: TransformRecord
    """How the model was made."""
    model: Mapping[str, Tensor]
    """Its state dict, on the CPU."""
    rules: Mapping[str, Mapping[str, Any]]
    """The options of each weight's rules by its path: a config in plain values."""
    optimizers: tuple[Mapping[str, Any], ...]
    """State of each optimizer, by the names of the parameters."""
    plasticity: tuple[Mapping[str, Any], ...]
    """State of each attachment."""
    extra: Mapping[str, Any]
    """Values that the user saved with it."""

    def __repr__(self) -> str:
        steps = [f"attachment at step {state.get('steps')}" for state in self.plasticity]
        held = [f"{len(self.model)} tensors", *["optimizer"] * len(self.optimizers), *steps]
        held += [f"extra: {', '.join(map(str, [*self.extra][:10]))}"] if self.extra else []
        made = f"{self.record.model}, biofx {self.record.biofx}, torch {self.record.torch}"
        return f"<{type(self).__name__} of {made}: {', '.join(held)}>"

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint:
        """Read a file, without running any code in it.

        Raises:
            CheckpointError: it cannot be read, is damaged, is no checkpoint, or is newer than this biofx.
        """
        return checkpoint_of(read_checkpoint(path), path)


def checkpoint_of(content: Mapping[str, Any], path: str | Path) -> Checkpoint:
    """Return the content of a checkpoint, with the type of each part checked.

    Raises:
        CheckpointError: a part is missing or of another type.
    """
    kinds: dict[str, type] = {
        "record": str,
        "model": dict,
        "rules": dict,
        "optimizers": list,
        "plasticity": list,
        "extra": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise CheckpointError(
                f"{path}: expected {name!r} to be a {kind.__name__}, found {type(content.get(name)).__name__}"
            )
    return Checkpoint(
        TransformRecord.from_json(content["record"]),
        content["model"],
        content["rules"],
        tuple(content["optimizers"]),
        tuple(content["plasticity"]),
        content["extra"],
    )


def save(
    bio_model: nn.Module,
    path: str | Path,
    *,
    optimizer: Optimizers = None,
    plasticity: Attachments = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save a transformed or converted model, and what is needed to continue its training.

    The file holds plain values and tensors only: ``torch.load(path, weights_only=True)`` reads it. It is
    written completely or not at all; an older file of that name stays until the new one is complete. A path
    that is a symlink is followed.

    Args:
        bio_model: wrapped (DDP, ``torch.compile``) or not; of several ranks, one should save.
        path: of the file.
        optimizer: the optimizer, or several in a list.
        plasticity: the attachment that :func:`biofx.attach` returned, or several in a list.
        extra: plain values and tensors of your own: an epoch, a scheduler's state, a random state.

    Raises:
        CheckpointError: the model has no record of how it was made, or its graph was changed since; an
            optimizer steps parameters of another model; a value is not plain, or is a tensor without values;
            the file cannot be written.
    """
    write_checkpoint(path, content_of(bio_model, optimizer, plasticity, extra))


def content_of(
    bio_model: nn.Module, optimizer: Optimizers, plasticity: Attachments, extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Raises:
        CheckpointError: as for :func:`save`.
    """
    if extra is not None and not isinstance(extra, Mapping):
        raise CheckpointError(f"extra: expected a dict of names to values, found a {type(extra).__name__}")
    model = transformed(bio_model)
    record: Any = record_of(model)
    expected = f"expected a {type(model).__name__} whose state can be read, found one that raises"
    with as_checkpoint_error(expected, but=BiofxError):
        return {
            "biofx": record.biofx,
            "torch": record.torch,
            "record": record.to_json(),
            "model": model.state_dict(),
            "rules": {name: config_to_plain(state.config) for name, state in bio_modules(model).items()},
            "optimizers": [optimizer_state(model, entry) for entry in listed(optimizer, Optimizer)],
            "plasticity": [entry.state_dict() for entry in listed(plasticity, Attachment)],
            "extra": {} if extra is None else extra,
        }


def transformed(bio_model: nn.Module) -> BioGraphModule:
    """Return the transformed model inside any wrapper.

    Raises:
        CheckpointError: it has no record of how it was made, or was changed since.
    """
    model: Any = unwrapped(bio_model)
    if record_of(model) is None or not isinstance(model, BioGraphModule):
        raise CheckpointError(
            f"expected a model that biofx.transform or a BioConverter made, found a {type(model).__name__} "
            "without a record of how it was made (tracing a model again drops it); save the transformed "
            "model itself, or its state_dict with torch.save"
        )
    check_record(model)
    return model


def check_record(model: BioGraphModule) -> None:
    """Check that a model's graph is the one in its record.

    Raises:
        CheckpointError: it was changed since.
    """
    record = record_of(model)
    if record is not None and record.graph != lines_as_transformed(model):
        raise CheckpointError(
            "expected the graph that biofx.transform made, found one that was changed since, which the "
            "record of the transform does not show; make the change with a pass: "
            "biofx.transform(bio_model, passes=...)"
        )


def listed(given: Any, kind: type) -> list[Any]:
    """Return optimizers or attachments, given as one, several or None, as a list.

    Raises:
        InputError: they are something else.
    """
    entries = [] if given is None else [given] if isinstance(given, kind) else given
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, kind) for entry in entries):
        raise InputError(f"expected a {kind.__name__} or a list of them, found {given!r}")
    return list(entries)
