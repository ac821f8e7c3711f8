"""The analysis of units of a run that was observed: shapes are known, and so are some values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from biofx.analysis.forward import CannotFollow
from biofx.analysis.layout import Axis, UnitLayout
from biofx.analysis.moved_labels import moved
from biofx.analysis.units import UnitAnalysis, UnitCall, UnitValue
from biofx.graph.node_kinds import changed_in_place, number_nodes
from biofx.graph.observed_functions import SHAPE, made_elsewhere
from biofx.layers import kind_of_call
from biofx.layers.single_weight import EMBEDDING, EMBEDDING_BAG
from biofx.model.graph_places import module_at


class ObservedUnitAnalysis(UnitAnalysis):
    """What has been found out about the units of an observed run."""

    is_observed = True

    def __init__(self, graph_module: GraphModule) -> None:
        self._constants = _Constants(graph_module)
        super().__init__(graph_module)

    def value_of(self, node: Node) -> UnitValue:
        """Return what is known of a node's value, with what was seen of it."""
        if node.target is made_elsewhere:
            self._fed.add(node)  # weights may have made it
            raise CannotFollow("no function was seen to make it")
        value = super().value_of(node)
        if SHAPE in node.meta and value.parts is None:
            value = value.replace(rank=len(node.meta[SHAPE]))
        if not value.has_units and self._constants.is_nonnegative(node):
            value = value.replace(nonnegative=True)
        return value

    def end(self, node: Node, reason: str) -> UnitValue:
        """Note that groups end at a node; new units lie where those of its argument lay, if shapes agree."""
        ended = super().end(node, reason)
        shape = node.meta.get(SHAPE)
        for source in node.all_input_nodes if shape else ():
            layout = self.values[source].layout
            if layout is not None and source.meta.get(SHAPE) == shape:
                distinct, index = layout.labels.unique(return_inverse=True)
                units = self.new_units("open", node.name, len(distinct))
                return UnitValue(layout=UnitLayout(units[index], layout.axes))
        if shape and _looks_up(node, self.module_of(node)):
            return UnitValue(layout=self.decide(ended, (Axis(-1, (0,)),), shape[-1:]))
        return ended

    def called(self, call: UnitCall) -> UnitValue:
        """Return what the rule for an operation says of its result; one that moves entries needs no rule."""
        if call.node not in self.sites:
            try:
                known = moved(call)
            except CannotFollow as end:
                return self.end(call.node, str(end))
            if known is not None:
                return known
        return super().called(call)


class _Constants:
    """What follows from buffers and numbers alone: a mask, ``1 - self.alpha``, a first state of zeros.

    Their values at the time of the analysis say whether they may be negative, as those of numbers do.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph_module = graph_module
        self._numbers = number_nodes(graph_module, graph_module.graph)
        self._values: dict[Node, Any] = dict(self._numbers)

    @torch.no_grad()
    def is_nonnegative(self, node: Node) -> bool:
        """Whether a value is constant and has no negative entry; to be asked in the order of execution."""
        for changed in changed_in_place(node):
            self._values.pop(changed, None)
        name = getattr(node.target, "__name__", str(node.target))
        if name in _NEVER_NEGATIVE and node.op == "call_function":
            return True
        if (value := self._value_of(node, name)) is None:
            return False
        self._values[node] = value
        return isinstance(value, Tensor) and not value.is_complex() and bool((value >= 0).all())

    def _value_of(self, node: Node, name: str) -> Any:
        if node.op == "get_attr":
            found = module_at(self._graph_module, str(node.target).rpartition(".")[0])
            held: Any = getattr(found, str(node.target).rpartition(".")[2], None)
            is_constant = isinstance(held, Tensor) and not isinstance(held, nn.Parameter)
            return held if is_constant and not held.is_meta and held.layout is torch.strided else None
        inputs = node.all_input_nodes
        is_random = "rand" in name or "normal" in name or "empty" in name or name in _RANDOM
        if not node.op.startswith("call_") or node.op == "call_module" or is_random or changed_in_place(node):
            return None
        if any(source not in self._values for source in inputs) or _size(node) > _MOST_ENTRIES:
            return None
        args: Any = map_arg(node.args, self._values.__getitem__)
        kwargs: Any = dict(map_arg(node.kwargs, self._values.__getitem__))
        try:
            called: Any = node.target if node.op == "call_function" else getattr(args[0], str(node.target))
            return called(*(args if node.op == "call_function" else args[1:]), **kwargs)
        except Exception:
            return None  # what it needs is not known here


def _size(node: Node) -> int:
    return math.prod(node.meta.get(SHAPE, ()))


_MOST_ENTRIES = 1 << 20
"""The largest constant that is computed, a count of entries."""
_RANDOM = frozenset({"dropout", "multinomial", "rrelu", "bernoulli"})
_NEVER_NEGATIVE = frozenset(
    {"zeros", "ones", "rand", "bernoulli"}
    | {spelled for name in str.split("gt ge lt le eq ne") for spelled in (name, f"__{name}__")}
)


def _looks_up(node: Node, module: nn.Module | None) -> bool:
    kind = kind_of_call(node)
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or kind in (EMBEDDING, EMBEDDING_BAG)
