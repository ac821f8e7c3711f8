"""Invariants of masks: connections that do not exist are exactly 0 in the weights that layers use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from biofx.diagnostics.audit import Finding, Placed, Subject, Uses, finding, invariant
from biofx.errors import InvariantError
from biofx.layers.constant_part import WeightUse
from biofx.layers.layer_kind import argument
from biofx.operators.mask_ops import EXISTS, FORBIDDEN, MISSING, existing

_ROUNDING = 1e-3
"""How far from its value a mask may be, as rounding leaves it."""


@invariant("masks", "no effective weight is other than 0 where no connection exists")
def effective_masks(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the effective weights where no connection exists; details say how many connections there are."""
    for placed, mask in _masked(subject):
        path, weight = placed.state.path, placed.state.parameter
        found = [use for use in uses.of_parameter.get(id(weight), []) if use.masks]
        wrong, message = 0, ""
        for use in found:
            try:
                used: Tensor = uses.constants.value(use.whole)
            except InvariantError as error:
                wrong, message = (
                    1,
                    f"the masked weight cannot be computed: {error}; transform the model again",
                )
                break
            wrong = max(wrong, int((used[~existing(mask)] != 0).sum()))
        message = message or (
            f"{wrong} of {mask.numel()} effective weights are other than 0 where no connection exists; what "
            "the graph does after the mask breaks it, so transform the model again"
        )
        count = int(existing(mask).count_nonzero())
        yield finding(placed.layer, path, mask.numel(), wrong, message, connections=count)


@invariant("mask values", "a mask is shaped like its weight, and each entry is -1, 0 or 1")
def mask_values(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the entries of masks that say neither that a connection exists nor that it does not."""
    for placed, mask in _masked(subject):
        weight = placed.state.parameter
        allowed = torch.tensor((FORBIDDEN, MISSING, EXISTS), dtype=mask.dtype, device=mask.device)
        wrong = int(((mask.unsqueeze(-1) - allowed).abs().amin(-1) > _ROUNDING).sum())
        message = f"{wrong} of {mask.numel()} entries are none of -1, 0, 1; restore them from a checkpoint"
        if weight is not None and weight.shape != mask.shape:
            wrong = mask.numel()
            message = f"its shape is {tuple(mask.shape)}, and that of the weight {tuple(weight.shape)}"
        yield finding(placed.layer, f"{placed.place}.connection_mask", mask.numel(), wrong, message)


@invariant("mask uses", "masks act in the graph, wherever a masked weight is used, and are the weight's own")
def mask_uses(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the uses of masked weights that read the parameter beside its mask, or through another."""
    for placed, mask in _masked(subject):
        found = uses.of_parameter.get(id(placed.state.parameter), [])
        beside = [use for use in found if not _is_own(use, mask, uses)]
        readers = ", ".join(repr(use.reader.name) for use in beside if use.reader is not None)
        message = f"{readers} reads the parameter beside its mask; transform the model again"
        yield finding(placed.layer, placed.state.path, max(1, len(found)), len(beside), message)


def _is_own(use: WeightUse, mask: Tensor, uses: Uses) -> bool:
    if not use.masks:
        return False
    read = argument(use.masks[0], 1, "mask")
    return read.op != "get_attr" or read not in uses.constants or uses.constants.value(read) is mask


def _masked(subject: Subject) -> Iterator[tuple[Placed, Tensor]]:
    """Yield the states with a mask that has values."""
    for placed in subject.states():
        mask = placed.state.connection_mask
        if mask is not None and not mask.is_meta:
            yield placed, mask
