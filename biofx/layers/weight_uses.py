"""The ways that weights take through a graph, from the parameter to what works on the model's data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from torch import nn
from torch.fx import Node

from biofx.graph.node_kinds import queries_metadata
from biofx.graph.printing import function_name
from biofx.layers.constant_part import ConstantPart
from biofx.layers.weight_slots import argument
from biofx.operators.rate_ops import GRADIENT_SCALINGS
from biofx.operators.sign_ops import constrain_sign

_OPERATORS: frozenset[Any] = GRADIENT_SCALINGS | {constrain_sign}
_MOVES = frozenset(
    {
        *("chunk", "contiguous", "detach", "expand", "flatten", "getattr", "getitem", "index_select"),
        *("movedim", "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes", "t"),
        *("tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
    }
)


class Treatment(IntEnum):
    """What the graph does to a weight besides constraining and scaling it."""

    NOTHING = 0
    MOVED = 1
    """Its entries are sliced, transposed or reshaped."""
    COMPUTED = 2
    """New entries are computed from them."""


@dataclass(frozen=True)
class WeightUse:
    """One way that a parameter takes to something that works on the model's data."""

    parameter: nn.Parameter
    path: str
    """Path by which the graph reads the parameter."""
    expression: Node
    """The last node that follows from parameters and buffers alone."""
    whole: Node
    """The last node on the way at which the weight is still laid out as the parameter is."""
    reader: Node | None
    """The node that works on data."""
    constraints: tuple[Node, ...] = ()
    """Sign constraints on the way, innermost first."""
    scalings: tuple[Node, ...] = ()
    """Gradient scalings on the way, innermost first."""
    before: Treatment = Treatment.NOTHING
    """What happens to the parameter up to the first constraint; all of it where there is none."""
    after: Treatment = Treatment.NOTHING
    """What happens to it from there on."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from other ways to the same place."""
        return (id(self.parameter), self.whole, self.constraints, self.scalings, self.before, self.after)


def weight_uses(constants: ConstantPart) -> list[WeightUse]:
    """Return every way from a parameter to something that works on data, in the graph's order."""
    ways: dict[Node, dict[tuple[Any, ...], WeightUse]] = {}
    uses: list[WeightUse] = []
    for node in constants.graph.nodes:
        if node not in constants:
            continue
        arriving = _arriving(node, constants, ways)
        if arriving:
            ways[node] = {way.key: way for way in arriving}
            readers = [user for user in node.users if user not in constants]
            uses += [replace(way, reader=user) for way in ways[node].values() for user in readers]
    return uses


def _arriving(
    node: Node, constants: ConstantPart, ways: Mapping[Node, Mapping[tuple[Any, ...], WeightUse]]
) -> list[WeightUse]:
    """Return the ways that lead to a node, those that end in its signs or rates left out."""
    if (parameter := constants.parameter(node)) is not None:
        return [WeightUse(parameter, str(node.target), node, node, None)]
    if node.target in _OPERATORS:
        weight = argument(node, 0, "weight")
        return [_through(way, node) for way in ways.get(weight, {}).values()]
    if queries_metadata(node):
        return []
    moves = function_name(node.target) in _MOVES
    kind = Treatment.MOVED if moves else Treatment.COMPUTED
    found = []
    for source in node.all_input_nodes:
        for way in ways.get(source, {}).values():
            side = "after" if way.constraints else "before"
            found.append(replace(way, expression=node, **{side: max(kind, getattr(way, side))}))
    return found


def _through(way: WeightUse, node: Node) -> WeightUse:
    """Return a way that goes on through a constraint or a scaling."""
    untouched = way.before == way.after == Treatment.NOTHING
    whole = node if untouched else way.whole
    if node.target is constrain_sign:
        return replace(way, expression=node, whole=whole, constraints=(*way.constraints, node))
    return replace(way, expression=node, whole=whole, scalings=(*way.scalings, node))
