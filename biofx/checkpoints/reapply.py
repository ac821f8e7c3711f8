"""Make a transformed model again from its record, and tell whether two were made alike."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule

from biofx.checkpoints.rate_types import without_rate_types
from biofx.converter import BioConverter
from biofx.errors import CheckpointError, OptionError, SelectorError
from biofx.model.graph_module import BioGraphModule
from biofx.rewriting.plain_passes import config_from_plain, pass_from_plain, same_options
from biofx.rewriting.record import TransformRecord, TransformStep, record_of
from biofx.transform import transform


def make_again(record: TransformRecord, model: nn.Module) -> BioGraphModule:
    """Do to a model what a record says was done to another of its architecture; the model is not changed.

    Raises:
        CheckpointError: the model is another one, or the record needs something that no file can carry.
        CaptureError: the model cannot be captured.
    """
    made: nn.Module = model
    for step in record.steps:
        try:
            made = _taken(step, made)
        except (SelectorError, OptionError) as error:
            raise CheckpointError(
                f"expected the model that the checkpoint was made from ({record.model}), found one that "
                f"{step.pipeline} does not fit: {error}"
            ) from error
    if not isinstance(made, BioGraphModule):
        raise CheckpointError("expected the record of at least one transform, found none")
    return made


def _taken(step: TransformStep, model: nn.Module) -> BioGraphModule:
    if step.recorded and not isinstance(model, GraphModule):
        raise CheckpointError(
            "the model was captured with example_inputs, which a checkpoint does not carry; transform the "
            "model with them and the same options, and load into the result"
        )
    if step.door == "transform":
        return transform(model, passes=pass_from_plain(step.passes), opaque=step.opaque).graph_module
    if step.door == BioConverter.__qualname__ and step.config is not None:
        converted: BioGraphModule = BioConverter(config_from_plain(step.config)).convert(model)
        return converted
    raise CheckpointError(
        f"the model was converted by {step.door}, which a checkpoint cannot carry; convert the model with "
        "it, and load into the result"
    )


def check_same_making(record: TransformRecord, made: BioGraphModule, *, any_rate_type: bool = False) -> None:
    """Check that a model was made as a record says.

    Args:
        record: of the saved model.
        made: the model.
        any_rate_type: whether the two may keep their rates in different types.

    Raises:
        CheckpointError: it was not; the message names the first difference.
    """
    own = record_of(made)
    if own is None:
        raise CheckpointError("expected a transformed model, found one that does not say how it was made")
    if any_rate_type and [step.passes for step in own.steps] != [step.passes for step in record.steps]:
        own, record = without_rate_types(own), without_rate_types(record)
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
        for selector, picked in expected.matches.items():
            if found.matches.get(selector) != picked:
                raise CheckpointError(
                    f"{kind}, where the selector {selector} picked {_show(picked)}; in this model it picks "
                    f"{_show(found.matches.get(selector, []))}. Load into the architecture that was saved"
                )
    if own.graph != record.graph:
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
