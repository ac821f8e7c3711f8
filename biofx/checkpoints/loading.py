"""Load a checkpoint: into a transformed model in place, or into a model that is transformed for it.

Everything is checked before anything is changed. How a model was made is compared except for the type of its
rates: saved rates are converted.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.optim import Optimizer

from biofx.capture.exported_programs import model_of
from biofx.checkpoints.checkpoint import Attachments, Checkpoint, Optimizers, check_record, listed
from biofx.checkpoints.checkpoint_file import as_checkpoint_error, plain
from biofx.checkpoints.model_state import (
    adopt_dtypes,
    check_layout,
    check_place,
    check_state,
    convert_rates,
    load_state,
)
from biofx.checkpoints.optimizer_state import fitted_state, take_state
from biofx.config import RATE_DTYPE, BioConfig
from biofx.converter import BioConverter
from biofx.errors import BiofxError, BiofxWarning, CheckpointError, InputError, OptionError, SelectorError
from biofx.model.graph_module import BioGraphModule
from biofx.model.rollback import unchanged_on_failure
from biofx.plasticity.attachment import Attachment
from biofx.plasticity.model_states import bio_modules, prepare_states, unwrapped
from biofx.rewriting.held_parameters import hold_again
from biofx.rewriting.plain_passes import config_from_plain, config_to_plain, pass_from_plain, same_options
from biofx.rewriting.record import ATTRIBUTE, COMPILED, TransformRecord, TransformStep, record_of
from biofx.transform import transform

_UNFIT = "expected a checkpoint that fits, found one that cannot be loaded"
_FIELD, _OPTION, _PASS = "fuzzy_lr_dtype", "dtype", "scale-gradients"
_READ = re.compile(r"\S+ = self\.\S*bio_mod\S*\.fuzzy_learning_rate_parameters")
_SCALED = re.compile(r"(\S+) = scale_gradient(_by_seed)?\((\w+).*\)")


def load(
    checkpoint: str | Path | Checkpoint,
    model: nn.Module | ExportedProgram,
    *,
    optimizer: Optimizers = None,
    plasticity: Attachments = None,
    fuzzy_lr_dtype: str | None = None,
    example_inputs: Any = None,
) -> BioGraphModule:
    """Load a checkpoint.

    A plain model, of the architecture that the saved one was made from, is transformed as that one was; it
    is not changed itself. A model that was transformed in the same way takes over the saved state in place,
    together with its optimizer and attachment if given. Everything is checked first: after an error nothing
    has changed.

    A transformed model may store its rates in another type than the saved one: saved rates are converted to
    its type, or for a plain model to ``fuzzy_lr_dtype``. Rates that a type cannot represent are rounded to
    the nearest, and a ``UserWarning`` says by how much. Only rates that the seed draws can be converted to
    ``"seed"``.

    Args:
        checkpoint: the file, or what :meth:`Checkpoint.read` returned.
        model: the plain model, a program exported from it, or the transformed one.
        optimizer: with a transformed model: its optimizer, or several in a list, as saved.
        plasticity: with a transformed model: what :func:`biofx.attach` returned, or several in a list.
        fuzzy_lr_dtype: with a plain model: the type in which all its rates are stored, one of
            :data:`biofx.config.RATE_DTYPES`; None for the types of the saved ones.
        example_inputs: with a plain model that was captured with example inputs, which a checkpoint does not
            hold: such inputs, as for :func:`biofx.transform`.

    Returns:
        The transformed model with the saved state.

    Raises:
        CheckpointError: the file is damaged or newer than this biofx, or does not fit the model, the
            optimizer or the attachment.
        CaptureError: the plain model cannot be captured.
        OptionError: ``fuzzy_lr_dtype`` is unknown.
    """
    if fuzzy_lr_dtype is not None:
        RATE_DTYPE.check("fuzzy_lr_dtype", fuzzy_lr_dtype)
    saved = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.read(checkpoint)
    if isinstance(model, ExportedProgram):
        model = model_of(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model to load into, found {type(model).__name__}")
    target = unwrapped(model)
    if not isinstance(target, BioGraphModule) or record_of(target) is None:
        return _load_into_new(saved, model, optimizer, plasticity, fuzzy_lr_dtype, example_inputs)
    if example_inputs is not None:
        raise CheckpointError(
            "expected a plain model with example_inputs, found a transformed one, which needs none; leave "
            "example_inputs out"
        )
    if fuzzy_lr_dtype is not None:
        raise CheckpointError(
            "expected a plain model with fuzzy_lr_dtype, found a transformed one, whose rates have a type "
            "already; leave fuzzy_lr_dtype out, and the saved rates are converted to that type"
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
    examples: Any,
) -> BioGraphModule:
    if optimizer is not None or plasticity is not None:
        raise CheckpointError(
            "expected a transformed model with its optimizer, found a plain model, whose optimizer cannot "
            "step the parameters of the transformed one. Call load(path, model) first, build the optimizer "
            "from the result, and load into both"
        )
    with as_checkpoint_error(_UNFIT, but=BiofxError):
        return _made_from(saved, model, rate_type, examples)


def load_into(
    saved: Checkpoint, target: BioGraphModule, optimizers: list[Optimizer], attachments: list[Attachment]
) -> None:
    """Load into a transformed model; an error may leave it changed in part.

    Raises:
        CheckpointError: as for :func:`load`.
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
    memories = _paired("plasticity", attachments, saved.plasticity)
    for attachment, state in zip(attachments, memories, strict=True):
        with as_checkpoint_error("plasticity"):
            attachment.load_state_dict(state)
    load_state(target, saved.model)
    for entry, state in zip(optimizers, fitted, strict=True):
        take_state(entry, state, same_types=True)


def _made_from(saved: Checkpoint, model: nn.Module, rate_type: str | None, examples: Any) -> BioGraphModule:
    """Return a plain model transformed as the saved one was, with its state; the model is not changed.

    Args:
        saved: the checkpoint.
        model: of the architecture that the saved one was made from.
        rate_type: the type in which its rates are stored, None for the types of the saved ones.
        examples: inputs to capture it with, None for those that were captured without.

    Raises:
        CheckpointError: the model does not fit.
        CaptureError: the model cannot be captured.
    """
    check_place(model)
    record, rules = saved.record, saved.rules
    if rate_type is not None:
        record = _record_as(record, rate_type)
        rules = {path: {**options, _FIELD: rate_type} for path, options in rules.items()}
    configs = {path: config_from_plain(options) for path, options in rules.items()}
    made = _make_again(record, model, examples)
    check_same_making(saved.record, made, any_rate_type=rate_type is not None)
    prepare_states(made)  # of weights: what has no state then is no weight
    hold_again(made, configs.items())
    states = prepare_states(made)
    _check_weights(saved, states)
    for path, state in states.items():
        state.config = configs.get(path, state.config)
        state.keep_buffers()
    state_dict = saved.model if rate_type is None else convert_rates(made, saved.model)
    adopt_dtypes(made, state_dict)
    check_state(made, state_dict)
    load_state(made, state_dict)
    made.__dict__[ATTRIBUTE] = record if rate_type is None else _with_texts_of(made, record)
    return made


def _with_texts_of(made: BioGraphModule, record: TransformRecord) -> TransformRecord:
    """Return a record with the texts in the record of a model that was made from it."""
    own: Any = record_of(made)
    steps = tuple(
        dataclasses.replace(step, pipeline=found.pipeline)
        for step, found in zip(record.steps, own.steps, strict=True)
    )
    return dataclasses.replace(record, steps=steps, graph=own.graph)


def _check_rules(saved: Checkpoint, target: BioGraphModule) -> None:
    """Check that a model's rules have the options of the saved one's."""
    states = bio_modules(target)
    _check_weights(saved, states)
    defaults = config_to_plain(BioConfig())
    for path, saved_options in saved.rules.items():
        own, options = plain(config_to_plain(states[path].config), path), {**defaults, **saved_options}
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


def _make_again(record: TransformRecord, model: nn.Module, examples: Any) -> BioGraphModule:
    """Return a model transformed as a record describes; the model itself is not changed.

    Raises:
        CheckpointError: the model does not fit, or a transform needs something that no file can hold.
        CaptureError: the model cannot be captured.
    """
    made: nn.Module = model
    for step in record.steps:
        try:
            with warnings.catch_warnings():  # the saved weights take their place
                warnings.filterwarnings("ignore", ".* do not look freshly made", BiofxWarning)
                made = _repeated(step, made, examples)
        except (SelectorError, OptionError) as error:
            raise CheckpointError(
                f"expected the model that the checkpoint was made from ({record.model}), found one that "
                f"{step.pipeline} does not fit: {error}"
            ) from error
    if not isinstance(made, BioGraphModule):
        raise CheckpointError("expected the record of at least one transform, found none")
    return made


def _repeated(step: TransformStep, model: nn.Module, examples: Any) -> BioGraphModule:
    given = examples if step.recorded and not isinstance(model, GraphModule) else None
    if given is None and step.recorded and not isinstance(model, GraphModule):
        raise CheckpointError(
            "the model was captured with example_inputs, which a checkpoint does not hold: give such again, "
            "load(path, model, example_inputs=...)"
        )
    if step.door == "transform":
        passes = pass_from_plain(step.passes)
        return transform(model, passes=passes, opaque=step.opaque, example_inputs=given).graph_module
    if step.door == BioConverter.__qualname__ and step.config is not None:
        converted: BioGraphModule = BioConverter(config_from_plain(step.config)).convert(model)
        return converted
    if step.door == COMPILED:
        raise CheckpointError(
            "the checkpoint is of a model that was compiled, whose graphs are made by its calls; compile the "
            "model with biofx.backend as it was, call it once, and load into biofx.companion(compiled)"
        )
    raise CheckpointError(
        f"the model was converted by {step.door}, which a checkpoint cannot hold; convert the model with "
        "it, and load into the result"
    )


def check_same_making(record: TransformRecord, made: BioGraphModule, *, any_rate_type: bool = False) -> None:
    """Check that a model was made as a record describes.

    Args:
        record: of the saved model.
        made: the model.
        any_rate_type: whether the two may store their rates in different types.

    Raises:
        CheckpointError: it was made otherwise; the message names the first difference.
    """
    own = record_of(made)
    if own is None:
        raise CheckpointError("expected a transformed model, found one without a record of how it was made")
    if any_rate_type and [step.passes for step in own.steps] != [step.passes for step in record.steps]:
        own, record = _without_rate_types(own), _without_rate_types(record)
    kind = f"the checkpoint is of a {record.model}, made by biofx {record.biofx} with torch {record.torch}"
    if len(own.steps) != len(record.steps):
        raise CheckpointError(
            f"{kind}, transformed {len(record.steps)} times; found a model transformed {len(own.steps)} times"
        )
    for expected, found in zip(record.steps, own.steps, strict=True):
        alike = same_options(expected.passes, found.passes)
        if expected.door != found.door or not alike or expected.opaque != found.opaque:
            raise CheckpointError(
                f"{kind}, by {expected.door}: {expected.pipeline or 'no pass'}; found a model made by "
                f"{found.door}: {found.pipeline or 'no pass'}. Transform it with the same options"
            )
        if expected.door == COMPILED:
            continue  # its graphs depend on its calls
        for selector, picked in expected.matches.items():
            if found.matches.get(selector) != picked:
                raise CheckpointError(
                    f"{kind}, where the selector {selector} picked {_show(picked)}; in this model it picks "
                    f"{_show(found.matches.get(selector, []))}. Load into the architecture that was saved"
                )
    if own.graph != record.graph and record.steps[-1].door != COMPILED:
        lines = [*zip(record.graph, own.graph, strict=False), ("", "")]
        then, now = next((then, now) for then, now in lines if then != now or not then)
        raise CheckpointError(
            f"{kind}; its graph has {then or 'another end'!r} where this model's has "
            f"{now or 'another end'!r}. Load into the architecture that was saved, with the "
            "same weights frozen"
        )


def _show(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return f"[{shown}{', …' if len(names) > 6 else ''}]"


def _record_as(record: TransformRecord, dtype: str) -> TransformRecord:
    """Return a record in which all rates have one type; its graph and its texts are not changed."""
    steps = tuple(
        dataclasses.replace(
            step,
            passes=_passes_as(step.passes, dtype),
            config=None if step.config is None else _with_option(step.config, _FIELD, dtype),
        )
        for step in record.steps
    )
    return dataclasses.replace(record, steps=steps)


def _without_rate_types(record: TransformRecord) -> TransformRecord:
    """Return a record without the types in which rates are stored, to compare it with another."""
    graph = [_SCALED.sub(r"\1 = scale_gradient(\3)", line) for line in record.graph if not _READ.match(line)]
    return dataclasses.replace(_record_as(record, ""), graph=tuple(graph))


def _passes_as(plain: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    if "group" in plain:
        return {**plain, "group": [_passes_as(member, dtype) for member in plain["group"]]}
    if plain.get("pass") != _PASS:
        return plain
    return _with_option({**plain, "options": {**plain["options"], _OPTION: dtype}}, _OPTION, dtype)


def _with_option(plain: Mapping[str, Any], name: str, value: str) -> dict[str, Any]:
    """Return plain values with an option replaced, at the top and in every override that has it."""
    made = {**plain, name: value} if name in plain else dict(plain)
    if "overrides" in plain:
        made["overrides"] = [
            {**entry, "options": {**entry["options"], name: value}} if name in entry["options"] else entry
            for entry in plain["overrides"]
        ]
    return made
