"""Whether a parameter that no layer holds is read as a weight between units.

A weight between units is a factor of a sum over units: of a matrix product, or of a product element by
element that is then summed over an axis. Liquid time-constant networks (Hasani, Lechner, Amini, Rus, Grosu,
AAAI 2021) have synapses of the second kind, ``(w * sigmoid(sigma * (v[:, :, None] - mu)) * e).sum(1)``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from biofx.graph.graph_functions import call_with_parameters
from biofx.graph.printing import function_name
from biofx.layers import kind_of_call


def is_synaptic_read(parameter: nn.Parameter, source: Node, readers: Iterable[Node]) -> bool:
    """Whether what is read, moved about, masked or bent or not, is a weight between units.

    What Python does with it is not known; there a matrix, or a stack of them, counts as one.

    Args:
        parameter: what is read.
        source: the node that reads it, or an operator on it.
        readers: what reads that node.
    """
    if parameter.dim() < 2:
        return False
    pairs_units = sum(length > 1 for length in parameter.shape) > 1
    walk = _Walk(source.graph.nodes) if pairs_units else None
    pending = [(source, reader, _WEIGHT) for reader in readers]
    seen: set[tuple[Node, _State]] = set()
    while pending:
        before, reader, state = pending.pop()
        if (reader, state) in seen:
            continue
        seen.add((reader, state))
        if state.is_weight and _is_product(before, reader, parameter):
            return True
        if state.has_met and _is_sum_over_axis(reader):
            return True
        after: _State | None = None
        if function_name(reader.target) in _MOVES and reader.args and reader.args[0] is before:
            after = state
        elif walk is not None:
            after = walk.behind(before, reader, state)
        if after is not None:
            pending += [(reader, user, after) for user in reader.users]
    return False


def _is_product(source: Node, reader: Node, parameter: nn.Parameter) -> bool:
    """Whether a node takes a matrix product with a source, or is a layer with that as its weight."""
    kind = kind_of_call(reader)
    if kind is not None and any(place.read(reader) is source for place in kind.slots_of_call(reader)):
        return True
    if reader.target in _PRODUCTS and reader.op != "call_module":
        return True
    return reader.target is call_with_parameters and min(parameter.shape) > 1


def _is_sum_over_axis(node: Node) -> bool:
    return function_name(node.target) == "sum" and (
        len(node.args) > 1 or node.kwargs.get("dim", node.kwargs.get("axis")) is not None
    )


class _State(NamedTuple):
    """What became of a parameter on the way to a node."""

    is_weight: bool
    """Whether the value still follows from what the model holds, whatever the input."""
    has_met: bool
    """Whether its elements were paired with those of units, or of another weight."""


_WEIGHT = _State(is_weight=True, has_met=False)
_TWO_WEIGHTS = _State(is_weight=True, has_met=True)
_PAIRED = _State(is_weight=False, has_met=True)


class _Walk:
    """Follows a parameter through functions that act element by element."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._nodes = nodes
        self._held: set[Node] | None = None

    def behind(self, before: Node, reader: Node, state: _State) -> _State | None:
        """Return the state behind a reader; None where the parameter is no weight any more."""
        name = _elementwise_name(reader)
        if name is None:
            return None
        others = [node for node in reader.all_input_nodes if node is not before]
        if not others or not state.is_weight:
            return state
        data = [node for node in others if not self._is_held(node)]
        if name in _MULTIPLICATIONS:
            return _PAIRED if data else _TWO_WEIGHTS
        if not data:
            return state
        # positions and biases are added to units too, but not one of them to each pair of units
        return _PAIRED if all(map(_is_repeated_along_an_axis, data)) else None

    def _is_held(self, node: Node) -> bool:
        """Whether a value follows from what the model holds."""
        if self._held is None:
            self._held = set()
            for each in self._nodes:
                sources = each.all_input_nodes
                if each.op == "get_attr" or (
                    all(source in self._held for source in sources) if sources else _is_made_by_torch(each)
                ):
                    self._held.add(each)
        return node in self._held


def _is_made_by_torch(node: Node) -> bool:
    """Whether a node makes a tensor from nothing that the graph has, as ``torch.eye`` does."""
    return node.op == "call_function" and getattr(torch, function_name(node.target), None) is node.target


def _elementwise_name(node: Node) -> str | None:
    """Return the name of a function that acts element by element, also of a module's; None for others."""
    if node.op == "call_module":
        stack: Any = node.meta.get("nn_module_stack") or {}
        kind = next(reversed(stack.values()))[1] if stack else ""
        name = getattr(kind, "__name__", str(kind)).rpartition(".")[2].lower()
    else:
        name = function_name(node.target)
        name = name[2:-2] if name.startswith("__") else name
    return name if name in _ELEMENTWISE else None


def _is_repeated_along_an_axis(node: Node) -> bool:
    """Whether a value is given an axis along which the elements of another are met by the same one."""
    name = function_name(node.target)
    if name == "getitem":
        index = node.args[1]
        return isinstance(index, tuple) and any(entry is None for entry in index)
    return name in ("unsqueeze", "expand")


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
_MULTIPLICATIONS = frozenset(
    {"mul", "rmul", "multiply", "div", "truediv", "rtruediv", "divide", "where", "masked_fill"}
)
_ELEMENTWISE = _MULTIPLICATIONS | {
    *("add", "radd", "sub", "rsub", "neg", "pow", "rpow", "square", "sqrt", "rsqrt", "reciprocal"),
    *("exp", "expm1", "log", "log1p", "sin", "cos", "abs", "clamp", "clamp_min", "clamp_max", "identity"),
    *("maximum", "minimum", "relu", "relu6", "leaky_relu", "leakyrelu", "elu", "selu", "gelu", "silu"),
    *("sigmoid", "hardsigmoid", "logsigmoid", "tanh", "hardtanh", "softplus", "softsign", "dropout"),
}
