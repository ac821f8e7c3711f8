"""Save a transformed model with everything that a run has come to, and go on from there.

A checkpoint holds how the model was made, its state, the options of each layer's rules, and if given the
states of optimizer and attachment and whatever else the user puts in. Loading checks all of it before
anything is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.checkpoints.checkpoint_file import as_checkpoint_error, read_checkpoint, write_checkpoint
from biofx.checkpoints.loading import check_record, load_into, made_from
from biofx.checkpoints.optimizer_state import optimizer_state
from biofx.config import RATE_DTYPE
from biofx.errors import BiofxError, CheckpointError, InputError
from biofx.model.graph_module import BioGraphModule
from biofx.model.rollback import unchanged_on_failure
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.model_states import bio_modules, unwrapped
from biofx.rewriting.plain_passes import config_to_plain
from biofx.rewriting.record import TransformRecord, record_of

_UNFIT = "expected a checkpoint that fits, found one that cannot be loaded"
Optimizers = Optimizer | Sequence[Optimizer] | None
Attachments = Attachment | Sequence[Attachment] | None


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds, read but not yet loaded into anything."""

    record: TransformRecord
    """How the model was made."""
    model: Mapping[str, Tensor]
    """Its state dict, on the CPU."""
    rules: Mapping[str, Mapping[str, Any]]
    """The options of the rules, a config in plain values for each weight's path."""
    optimizers: tuple[Mapping[str, Any], ...]
    """State of each optimizer, by name of the parameters."""
    plasticity: tuple[Mapping[str, Any], ...]
    """State of each attachment."""
    extra: Mapping[str, Any]
    """What the user put in."""

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint:
        """Read a file; no code of the file's is run.

        Raises:
            CheckpointError: it cannot be read, is damaged, is something else, or is newer than this biofx.
        """
        return checkpoint_of(read_checkpoint(path), path)


def checkpoint_of(content: Mapping[str, Any], path: str | Path) -> Checkpoint:
    """Return the content of a checkpoint, each part of it checked for its kind.

    Raises:
        CheckpointError: a part is missing or of another kind.
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
    """Save a transformed or converted model, and what its training needs to go on.

    The file holds plain values and tensors only: ``torch.load(path, weights_only=True)`` reads it. It is
    written whole or not at all; an older file of that name stays until the new one is complete. A path that
    is a symlink is followed.

    Args:
        bio_model: wrapped (DDP, ``torch.compile``) or not; of several ranks, one should save.
        path: where to.
        optimizer: the optimizer, or several in a list.
        plasticity: what :func:`biofx.attach` returned, or several in a list.
        extra: plain values and tensors of your own: an epoch, a scheduler's state, a random state.

    Raises:
        CheckpointError: the model does not know how it was made, or its graph was changed since; an
            optimizer steps other parameters; a value is not plain, or a tensor without values; the file
            cannot be written.
    """
    write_checkpoint(path, content_of(bio_model, optimizer, plasticity, extra))


def content_of(
    bio_model: nn.Module, optimizer: Optimizers, plasticity: Attachments, extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what goes into a checkpoint.

    Raises:
        CheckpointError: as :func:`save` says.
    """
    if extra is not None and not isinstance(extra, Mapping):
        raise CheckpointError(f"extra: expected a dict of names to values, found a {type(extra).__name__}")
    model = transformed(bio_model)
    record: Any = record_of(model)
    expected = f"expected a {type(model).__name__} whose state can be read, found one that raises"
    with as_checkpoint_error(expected, but=BiofxError):
        return _content(model, record, optimizer, plasticity, extra)


def _content(
    model: BioGraphModule,
    record: TransformRecord,
    optimizer: Optimizers,
    plasticity: Attachments,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
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


def load(
    checkpoint: str | Path | Checkpoint,
    model: nn.Module,
    *,
    optimizer: Optimizers = None,
    plasticity: Attachments = None,
    fuzzy_lr_dtype: str | None = None,
) -> BioGraphModule:
    """Load a checkpoint.

    A plain model, of the architecture that the saved one was made from, is transformed as that one was; it
    is not changed itself. A model that is transformed already, in the same way, takes over the saved state in
    place, and with it its optimizer and attachment if given. Everything is checked first: after an error all
    of them are as they were.

    A transformed model may keep its rates in another type than the saved one: they are converted to its own.
    So they are for a plain model where ``fuzzy_lr_dtype`` asks for it. Where a type has no such rates, the
    nearest are taken, and a ``UserWarning`` says by how much they differ. To ``"seed"`` only those can go
    that the seed draws.

    Args:
        checkpoint: the file, or what :meth:`Checkpoint.read` returned.
        model: the plain model, or the transformed one.
        optimizer: to be given with a transformed model: its optimizer, or several in a list, as saved.
        plasticity: likewise, what :func:`biofx.attach` returned.
        fuzzy_lr_dtype: to be given with a plain model: what all of its rates are to be stored as, if not as
            the saved ones; one of :data:`biofx.config.RATE_DTYPES`.

    Returns:
        The transformed model with the saved state.

    Raises:
        CheckpointError: the file is damaged or newer than this biofx; the model, the optimizer or the
            attachment is another than was saved.
        CaptureError: the plain model cannot be captured.
        OptionError: there is no such type of rates.
    """
    if fuzzy_lr_dtype is not None:
        RATE_DTYPE.check("fuzzy_lr_dtype", fuzzy_lr_dtype)
    saved = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.read(checkpoint)
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model to load into, found {type(model).__name__}")
    target = unwrapped(model)
    if not isinstance(target, BioGraphModule) or record_of(target) is None:
        return _load_into_new(saved, model, optimizer, plasticity, fuzzy_lr_dtype)
    if fuzzy_lr_dtype is not None:
        raise CheckpointError(
            "expected a plain model with fuzzy_lr_dtype, found a transformed one, whose rates have a type "
            "already; leave fuzzy_lr_dtype out, and the saved rates are converted to that"
        )
    optimizers, attachments = listed(optimizer, Optimizer), listed(plasticity, Attachment)
    with unchanged_on_failure(target, *optimizers, *attachments), as_checkpoint_error(_UNFIT):
        load_into(saved, target, optimizers, attachments)
    return target


def _load_into_new(
    saved: Checkpoint,
    model: nn.Module,
    optimizer: Optimizers,
    plasticity: Attachments,
    rate_type: str | None,
) -> BioGraphModule:
    if optimizer is not None or plasticity is not None:
        raise CheckpointError(
            "expected a transformed model with its optimizer, found a plain model: an optimizer of its "
            "parameters cannot step those of the transformed one. Call load(path, model) first, build the "
            "optimizer from the result, and load into both"
        )
    with as_checkpoint_error(_UNFIT, but=BiofxError):
        return made_from(saved, model, rate_type)


def transformed(bio_model: nn.Module) -> BioGraphModule:
    """Return the transformed model inside any wrapper, as its record describes it.

    Raises:
        CheckpointError: it does not know how it was made, or was changed since.
    """
    model: Any = unwrapped(bio_model)
    if record_of(model) is None or not isinstance(model, BioGraphModule):
        raise CheckpointError(
            f"expected a model that biofx.transform or a BioConverter made, found a {type(model).__name__} "
            "that does not say how it was made (tracing a model anew forgets it); save the transformed model "
            "itself, or its state_dict with torch.save"
        )
    check_record(model)
    return model


def listed(given: Any, kind: type) -> list[Any]:
    """Return optimizers or attachments as a list, which may be given as one, several or None.

    Raises:
        InputError: they are something else.
    """
    entries = [] if given is None else [given] if isinstance(given, kind) else given
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, kind) for entry in entries):
        raise InputError(f"expected a {kind.__name__} or a list of them, found {given!r}")
    return list(entries)
