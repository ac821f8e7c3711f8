"""Load what a checkpoint holds: into a transformed model in place, or into one that is made for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from biofx.checkpoints.checkpoint_file import as_checkpoint_error, plain
from biofx.checkpoints.model_state import adopt_dtypes, check_layout, check_place, check_state, load_state
from biofx.checkpoints.optimizer_state import fitted_state, take_state
from biofx.checkpoints.rate_types import convert_rates, record_as, rules_as
from biofx.checkpoints.reapply import check_same_making, make_again
from biofx.errors import CheckpointError
from biofx.model.graph_module import BioGraphModule
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.model_states import bio_modules, prepare_states
from biofx.rewriting.plain_passes import config_from_plain, config_to_plain
from biofx.rewriting.record import ATTRIBUTE, TransformRecord, graph_lines, record_of

if TYPE_CHECKING:
    from biofx.checkpoints.checkpoint import Checkpoint


def load_into(
    saved: Checkpoint, target: BioGraphModule, optimizers: list[Optimizer], attachments: list[Attachment]
) -> None:
    """Load into a transformed model, which is changed in part where that fails.

    Raises:
        CheckpointError: as :func:`biofx.load` says.
    """
    check_record(target)
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


def made_from(saved: Checkpoint, model: nn.Module, rate_type: str | None) -> BioGraphModule:
    """Return a plain model transformed as the saved one was, with its state; the model is not changed.

    Args:
        saved: the checkpoint.
        model: of the architecture that the saved one was made from.
        rate_type: what its rates are to be stored as, None for what they were stored as.

    Raises:
        CheckpointError: it is another model.
        CaptureError: it cannot be captured.
    """
    check_place(model)
    record, rules = saved.record, saved.rules
    if rate_type is not None:
        record = record_as(record, rate_type)
        rules = {path: rules_as(options, rate_type) for path, options in rules.items()}
    configs = {path: config_from_plain(options) for path, options in rules.items()}
    made = make_again(record, model)
    check_same_making(saved.record, made, any_rate_type=rate_type is not None)
    states = prepare_states(made)
    _check_weights(saved, states)
    for path, state in states.items():
        state.config = configs.get(path, state.config)
        state.keep_diversity()
    state_dict = saved.model if rate_type is None else convert_rates(made, saved.model)
    adopt_dtypes(made, state_dict)
    check_state(made, state_dict)
    load_state(made, state_dict)
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


def check_record(model: BioGraphModule) -> None:
    """Check that a model's graph is as its record has it.

    Raises:
        CheckpointError: it was changed since.
    """
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
