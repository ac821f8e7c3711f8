"""The analysis of units of a run that was observed: shapes are known, and so are some values."""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from biofx.analysis.forward import CannotFollow
from biofx.analysis.layout import Axis, UnitLayout
from biofx.analysis.moved_labels import moved
from biofx.analysis.units import UnitAnalysis, UnitCall, UnitValue
from biofx.graph.observed_functions import made_elsewhere
from biofx.layers import kind_of_call
from biofx.layers.single_weight import EMBEDDING, EMBEDDING_BAG
from biofx.model.observed_runs import NONNEGATIVE, SHAPE


class ObservedUnitAnalysis(UnitAnalysis):
    """What has been found out about the units of an observed run."""

    is_observed = True

    def value_of(self, node: Node) -> UnitValue:
        """Return what is known of a node's value, with what was seen of it."""
        if node.target is made_elsewhere:
            self._fed.add(node)  # weights may have made it
            raise CannotFollow("no function was seen to make it")
        value = super().value_of(node)
        if SHAPE in node.meta and value.parts is None:
            value = value.replace(rank=len(node.meta[SHAPE]))
        if NONNEGATIVE in node.meta and not value.has_units:
            value = value.replace(nonnegative=node.meta[NONNEGATIVE])
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


def _looks_up(node: Node, module: nn.Module | None) -> bool:
    kind = kind_of_call(node)
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or kind in (EMBEDDING, EMBEDDING_BAG)
