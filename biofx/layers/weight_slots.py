"""Where the weights of a layer are: their names in its module, their places in a call of its function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import Node

from biofx.layers.layer_kinds import ATTENTION, LayerKind
from biofx.operators.compound_ops import GATES


@dataclass(frozen=True)
class WeightSlot:
    """The place of one weight of a layer."""

    name: str = "weight"
    """Path of the parameter inside the layer's module."""
    role: str = "input"
    """What the weight's columns, its presynaptic units, are.

    ========================  ======================================================================
    ``"input"``               the layer's input
    ``"stacked"``             the units of the recurrent layer below, in all directions
    ``"hidden"``              the units of the same recurrent layer, a step before
    ``"projection"``          the units of the same recurrent layer, before they are projected
    ``"query"``, ``"key"``    the input that queries or keys are made from
    ``"value"``               the input that values are made from
    ``"query_key_value"``     all three, one below the other in the rows
    ``"attention_output"``    the values, summed by attention, head beside head
    ========================  ======================================================================
    """
    argument: tuple[int, str] = (1, "weight")
    """The argument of the function, by place and by name."""
    index: int | None = None
    """Its index, where that argument is a list."""
    blocks: int = 1
    """How many matrices are stacked in the rows (gates; query, key and value), a count."""
    layer: int = 0
    """Which of stacked recurrent layers it belongs to, from 0."""
    direction: int = 0
    """0 where a recurrent layer reads forwards, 1 where it reads backwards."""

    def read(self, node: Node) -> Any:
        """Return the weight in a call of the function."""
        found = argument(node, *self.argument)
        return found if self.index is None else found[self.index]

    def write(self, node: Node, weight: Node) -> None:
        """Put another weight in its place."""
        place, name = self.argument
        given: Any = weight
        if self.index is not None:
            given = list(self._replaced(node, weight))
        if len(node.args) > place:
            node.args = (*node.args[:place], given, *node.args[place + 1 :])
        else:
            node.kwargs = {**node.kwargs, name: given}

    def _replaced(self, node: Node, weight: Node) -> Iterator[Any]:
        place, name = self.argument
        weights: Any = node.args[place] if len(node.args) > place else node.kwargs[name]
        for index, held in enumerate(weights):
            yield weight if index == self.index else held


def argument(node: Node, place: int, name: str) -> Any:
    """Return an argument of a node, given by place or by name; None if it is not given."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


ONE_WEIGHT = (WeightSlot(),)
"""The slots of a layer with one weight."""


def _only_slot(kind: LayerKind) -> tuple[WeightSlot, ...]:
    slot = ONE_WEIGHT[0]
    return ONE_WEIGHT if slot.argument == kind.argument else (replace(slot, argument=kind.argument),)


def slots_of_module(module: nn.Module, kind: LayerKind) -> tuple[WeightSlot, ...]:
    """Return the slots of the weights that a layer module has."""
    held: Any = module
    if not kind.is_compound:
        return _only_slot(kind)
    if kind is ATTENTION:
        return _attention_slots(joint=bool(held._qkv_same_embed_dim))
    return tuple(
        _recurrent_slots(
            held.mode, held.num_layers, held.bidirectional, bias=held.bias, projects=held.proj_size > 0
        )
    )


def slots_of_call(node: Node, kind: LayerKind) -> tuple[WeightSlot, ...]:
    """Return the slots of the weights in a call of the function."""
    if not kind.is_compound:
        return _only_slot(kind)
    if kind is ATTENTION:
        weights: Any = WeightSlot(argument=_ATTENTION_WEIGHTS).read(node)
        return _attention_slots(joint=len(weights) == 2)
    weights = WeightSlot(argument=_RECURRENT_WEIGHTS).read(node)
    num_layers: Any = node.kwargs.get("num_layers", 1)
    bidirectional = bool(node.kwargs.get("bidirectional", False))
    each = len(weights) // (num_layers * (1 + bidirectional))
    return tuple(
        _recurrent_slots(
            str(node.kwargs["mode"]), num_layers, bidirectional, bias=each > 3, projects=each in (3, 5)
        )
    )


_ATTENTION_WEIGHTS = (3, "weights")
_RECURRENT_WEIGHTS = (2, "weights")


def _attention_slots(*, joint: bool) -> tuple[WeightSlot, ...]:
    if joint:
        names = [("in_proj_weight", "query_key_value", 3)]
    else:
        names = [(f"{role[0]}_proj_weight", role, 1) for role in ("query", "key", "value")]
    names.append(("out_proj.weight", "attention_output", 1))
    return tuple(
        WeightSlot(name, role, _ATTENTION_WEIGHTS, index, blocks)
        for index, (name, role, blocks) in enumerate(names)
    )


def _recurrent_slots(
    mode: str, num_layers: int, bidirectional: bool, *, bias: bool, projects: bool
) -> Iterator[WeightSlot]:
    start = 0
    for layer in range(num_layers):
        for direction in range(1 + bidirectional):
            end = f"l{layer}{'_reverse' if direction else ''}"
            roles = [("weight_ih", "stacked" if layer else "input"), ("weight_hh", "hidden")]
            places = [start, start + 1]
            start += 4 if bias else 2
            if projects:
                roles.append(("weight_hr", "projection"))
                places.append(start)
                start += 1
            for (name, role), place in zip(roles, places, strict=True):
                blocks = 1 if role == "projection" else GATES[mode]
                yield WeightSlot(f"{name}_{end}", role, _RECURRENT_WEIGHTS, place, blocks, layer, direction)
