"""Save a transformed model with everything that a run has come to, and go on from there.

A checkpoint holds how the model was made, its state, the options of each layer's rules, and if given the
states of optimizer and attachment and whatever else the user puts in. Loading checks all of it before
anything is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.checkpoints.checkpoint_file import (
    as_checkpoint_error,
    plain,
    read_checkpoint,
    write_checkpoint,
)
from biofx.checkpoints.model_state import adopt_dtypes, check_layout, check_place, check_state, load_state
from biofx.checkpoints.optimizer_state import fitted_state, optimizer_state, take_state
from biofx.checkpoints.rate_types import convert_rates, record_as, rules_as
from biofx.checkpoints.reapply import check_same_making, make_again
from biofx.config import RATE_DTYPES
from biofx.errors import BiofxError, CheckpointError, InputError
from biofx.model.graph_module import BioGraphModule
from biofx.model.rollback import unchanged_on_failure
from biofx.plain_passes import config_from_plain, config_to_plain
from biofx.plasticity.attach import unwrapped
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.model_rules import bio_modules, prepare_states
from biofx.record import ATTRIBUTE, TransformRecord, graph_lines, record_of
from biofx.validate import check_choice

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
        check_choice("fuzzy_lr_dtype", fuzzy_lr_dtype, RATE_DTYPES)
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


_UNFIT = "expected a checkpoint that fits, found one that cannot be loaded"


def load_into(
    saved: Checkpoint, target: BioGraphModule, optimizers: list[Optimizer], attachments: list[Attachment]
) -> None:
    """Load into a transformed model, which is changed in part where that fails.

    Raises:
        CheckpointError: as :func:`load` says.
    """
    _check_record(target)
    check_same_making(saved.record, target, any_rate_type=True)
    prepare_states(target)
    saved = dataclasses.replace(saved, model=convert_rates(target, saved.model))
    check_state(target, saved.model)
    check_layout(target, saved.model)
    _check_rules(saved, target)
    states = _paired("optimizer", optimizers, saved.optimizers)
    fitted = [fitted_state(target, entry, state) for entry, state in zip(optimizers, states, strict=True)]
    told = _paired("plasticity", attachments, saved.plasticity)
    for attachment, state in zip(attachments, told, strict=True):
        with as_checkpoint_error("plasticity"):
            attachment.load_state_dict(state)
    load_state(target, saved.model)
    for entry, state in zip(optimizers, fitted, strict=True):
        take_state(entry, state, same_types=True)


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
        return _made(saved, model, rate_type)


def _made(saved: Checkpoint, model: nn.Module, rate_type: str | None) -> BioGraphModule:
    check_place(model)
    record, rules = saved.record, saved.rules
    if rate_type is not None:
        record = record_as(record, rate_type)
        rules = {path: rules_as(options, rate_type) for path, options in rules.items()}
    configs = {path: config_from_plain(options) for path, options in rules.items()}
    made = make_again(record, model)
    check_same_making(saved.record, made, any_rate_type=rate_type is not None)
    prepare_states(made)
    state_dict = saved.model if rate_type is None else convert_rates(made, saved.model)
    adopt_dtypes(made, state_dict)
    check_state(made, state_dict)
    states = bio_modules(made)
    _check_weights(saved, states)
    load_state(made, state_dict)
    for path, state in states.items():
        state.config = configs.get(path, state.config)
    made.__dict__[ATTRIBUTE] = record if rate_type is None else _told_as_made(record, made)
    return made


def _told_as_made(record: TransformRecord, made: BioGraphModule) -> TransformRecord:
    """Return a record with the texts of a model that was made by it."""
    own: Any = record_of(made)
    steps = tuple(
        dataclasses.replace(step, pipeline=told.pipeline)
        for step, told in zip(record.steps, own.steps, strict=True)
    )
    return dataclasses.replace(record, steps=steps, graph=own.graph)


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
    _check_record(model)
    return model


def _check_record(model: BioGraphModule) -> None:
    record = record_of(model)
    if record is not None and record.graph != graph_lines(model):
        raise CheckpointError(
            "expected the graph as biofx.transform left it, found one that was changed since, which the "
            "record of the transform does not know about; make the change with a pass: "
            "biofx.transform(bio_model, passes=...)"
        )


def _check_rules(saved: Checkpoint, target: BioGraphModule) -> None:
    """Refuse a model whose rules have other options than the saved one's."""
    states = bio_modules(target)
    _check_weights(saved, states)
    for path, options in saved.rules.items():
        own = plain(config_to_plain(states[path].config), path)
        wrong = [name for name in own if own[name] != options.get(name) and name != "fuzzy_lr_dtype"]
        if wrong:
            raise CheckpointError(
                f"{path!r}: expected {wrong[0]}={own[wrong[0]]!r}, as the model has it, found "
                f"{options.get(wrong[0])!r} in the checkpoint; transform the model with the options of the "
                "saved one, or load into a plain model"
            )


def _check_weights(saved: Checkpoint, states: Mapping[str, Any]) -> None:
    unknown = [path for path in saved.rules if path not in states]
    if unknown:
        raise CheckpointError(
            f"expected a model with a weight {unknown[0]!r}, which has saved state; found none"
        )


def _paired(
    name: str, given: Sequence[Any], saved: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    if given and len(given) != len(saved):
        raise CheckpointError(
            f"{name}: expected as many as were saved, {len(saved)}, found {len(given)}"
            + ("; the file was saved without" if not saved else "")
        )
    return saved if given else ()


def listed(given: Any, kind: type) -> list[Any]:
    """Return optimizers or attachments as a list, which may be given as one, several or None.

    Raises:
        InputError: they are something else.
    """
    entries = [] if given is None else [given] if isinstance(given, kind) else given
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, kind) for entry in entries):
        raise InputError(f"expected a {kind.__name__} or a list of them, found {given!r}")
    return list(entries)
