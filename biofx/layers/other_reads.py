"""Reads of a parameter that are no layer's: of positions that are added, of a weight that is transposed."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from biofx.graph.graph_functions import call_with_parameters
from biofx.graph.node_kinds import changed_in_place, queries_metadata
from biofx.graph.printing import function_name
from biofx.layers.layer_kinds import LayerKind, kind_of_call
from biofx.layers.weight_slots import WeightSlot, slots_of_call

READ = LayerKind(
    *(nn.Module, getattr, 0), why_no_units="it is used directly, and not as the weight of a layer with units"
)
"""The kind of a read that is no layer's."""


@dataclass(frozen=True)
class ReadSlot(WeightSlot):
    """All the places where one expression is read that are no layer's."""

    source: Node | None = None
    """The expression: the node that reads the parameter, or an operator on it."""
    readers: tuple[Node, ...] = ()

    def read(self, node: Node) -> Any:
        """Return the expression."""
        return self.source

    def write(self, node: Node, weight: Node) -> None:
        """Let all of the readers read another expression."""
        if self.source is not None:
            for reader in self.readers:
                reader.replace_input_with(self.source, weight)


def slot_of_reads(name: str, source: Node, readers: list[Node]) -> ReadSlot | None:
    """Return the place of those reads that take more than a parameter's size or type, None if none do."""
    taken = tuple(reader for reader in readers if not queries_metadata(reader))
    return ReadSlot(name, "direct", source=source, readers=taken) if taken else None


def obstacle_to_reads(parameter: nn.Parameter, slot: ReadSlot) -> str | None:
    """Return why the gradient cannot be scaled, None if it can."""
    if not parameter.is_floating_point():
        return f"its values are {str(parameter.dtype).removeprefix('torch.')}, no real numbers"
    for reader in slot.readers:
        if slot.source in changed_in_place(reader):
            return f"{reader.name!r} changes it in place"
    return None


def multiplies(slot: ReadSlot, parameter: nn.Parameter) -> bool:
    """Whether what is read, moved about or not, is a factor of a product or the weight of a layer.

    What Python does with it is not known; there a matrix, or a stack of them, counts as a factor.
    """
    if parameter.dim() < 2 or slot.source is None:
        return False
    pending = [(slot.source, reader) for reader in slot.readers]
    while pending:
        source, reader = pending.pop()
        kind = kind_of_call(reader)
        if kind is not None and any(place.read(reader) is source for place in slots_of_call(reader, kind)):
            return True
        if reader.target in _PRODUCTS and reader.op != "call_module":
            return True
        if reader.target is call_with_parameters and min(parameter.shape) > 1:
            return True
        if function_name(reader.target) in _MOVES and reader.args and reader.args[0] is source:
            pending += [(reader, user) for user in reader.users]
    return False


_PRODUCTS: frozenset[Any] = frozenset(
    {
        *(torch.matmul, torch.mm, torch.bmm, torch.einsum, torch.tensordot, torch.addmm, torch.baddbmm),
        *(torch.mv, torch.bilinear, F.bilinear, operator.matmul),
        *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm, Tensor.mv),
        *("matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "__matmul__", "__rmatmul__"),
    }
)
_MOVES = frozenset(
    {
        *("t", "transpose", "permute", "swapaxes", "movedim", "view", "reshape", "flatten", "unflatten"),
        *("squeeze", "unsqueeze", "expand", "contiguous", "getitem", "select", "narrow", "chunk", "split"),
        *("unbind", "index_select", "to", "float", "type_as", "getattr"),
    }
)
