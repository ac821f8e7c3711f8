"""Signs in the weights that layers really use: what they are to be, and how many are not."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from biofx.errors import InvariantError
from biofx.layers.constant_part import ConstantPart, Treatment, WeightUse
from biofx.layers.layer_kind import argument
from biofx.operators.sign_ops import signs_like

_OPTIONS = frozenset(inspect.signature(signs_like).parameters) - {"weight", "sign"}


@dataclass(frozen=True)
class SignCount:
    """How the synapses under sign constraints are doing, counts."""

    synapses: int = 0
    wrong: int = 0
    """Synapses whose effective weight has the other sign than their unit; more than 0 is a fault."""
    wrong_raw: int = 0
    """The same in the parameter, where the graph may yet put it right."""

    def __add__(self, other: SignCount) -> SignCount:
        return SignCount(
            self.synapses + other.synapses, self.wrong + other.wrong, self.wrong_raw + other.wrong_raw
        )


def wrong_signs(weight: Tensor, signs: Tensor) -> int:
    """Return how many entries of a weight have the other sign than theirs in ``signs``, a count."""
    return int((weight * signs < 0).count_nonzero())


def laid_out_signs(constants: ConstantPart, constraint: Node, weight: Tensor) -> Tensor:
    """Return the signs that a ``constrain_sign`` node gives to a weight, broadcastable to it.

    Args:
        constants: the constant part of the node's graph.
        constraint: the node; its signs and options are evaluated.
        weight: what the node is given.

    Raises:
        InvariantError: the signs cannot be computed, or do not fit the weight.
    """
    sign = constants.value(argument(constraint, 1, "sign"))
    options: dict[str, Any] = {
        name: constants.value(value) if isinstance(value, Node) else value
        for name, value in constraint.kwargs.items()
        if name in _OPTIONS
    }
    try:
        signs = signs_like(weight, sign, **options)
        fits = torch.broadcast_shapes(signs.shape, weight.shape) == weight.shape
    except (RuntimeError, IndexError):
        fits = False
    if not fits:
        raise InvariantError(
            f"expected signs that fit a weight of shape {tuple(weight.shape)}, found {sign.numel()} of shape "
            f"{tuple(sign.shape)}"
        )
    return signs


def count_signs(
    constants: ConstantPart,
    constraint: Node,
    uses: Iterable[WeightUse],
    given: Mapping[Node, Any] | None = None,
) -> SignCount:
    """Count the synapses under one ``constrain_sign`` node, as they come out where the weight is used.

    What slices or transposes the weight on its way there does the same to the signs. Where new weights of
    another shape are computed from it, the signs are counted right behind the constraint.

    Args:
        constants: the constant part of the node's graph.
        constraint: the node.
        uses: those that pass through the constraint.
        given: values of some nodes, instead of what they compute.

    Raises:
        InvariantError: the signs cannot be computed, or do not fit the weight.
    """
    held = dict(given or {})
    raw: Tensor = constants.value(argument(constraint, 0, "weight"), held)
    signs = laid_out_signs(constants, constraint, raw).expand(raw.shape)
    if raw.is_meta:
        return SignCount()
    synapses = wrong = 0
    treated = {use.expression: use.after for use in uses}
    for end, treatment in (treated or {constraint: Treatment.NOTHING}).items():
        used, wanted = constants.value(end, held), signs
        if treatment is Treatment.MOVED:
            wanted = constants.value(end, {constraint: signs.contiguous()})
        if not (isinstance(used, Tensor) and used.shape == wanted.shape):
            used, wanted = constants.value(constraint, held), signs
        synapses += used.numel()
        wrong += wrong_signs(used, wanted)
    return SignCount(synapses, wrong, wrong_signs(raw, signs))
