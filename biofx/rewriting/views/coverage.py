"""How much of a model its passes reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from biofx.graph.graph_view import GraphView
from biofx.rewriting.remarks import PassReport


@dataclass(frozen=True)
class Coverage:
    """What one pass reached."""

    layers: int
    """Layers with at least one candidate that it rewrote, a count."""
    candidate_layers: int
    """Layers that it considered at all, a count."""
    parameters: int
    """Elements of the parameters in the layers that it rewrote, a count."""
    all_parameters: int
    """Elements of all the model's parameters, a count."""
    reasons: Mapping[str, int]
    """Why candidates were left alone, and how many for that reason, the commonest first."""

    @property
    def fraction(self) -> float:
        """Share of the model's parameters that lie in rewritten layers, in [0, 1]."""
        return self.parameters / self.all_parameters if self.all_parameters else 0.0

    @classmethod
    def of(cls, entry: PassReport, graph: GraphView) -> Coverage:
        """Count what a pass did to a model, given the graph that went in."""
        rewritten = {remark.layer for remark in entry.remarks if remark.kind == "applied"}
        reasons: dict[str, int] = {}
        for remark in entry.remarks:
            if remark.kind == "missed":
                reasons[remark.message] = reasons.get(remark.message, 0) + 1
        return cls(
            layers=len(rewritten),
            candidate_layers=len({remark.layer for remark in entry.remarks}),
            parameters=sum(graph.modules[path].parameters for path in rewritten if path in graph.modules),
            all_parameters=sum(module.parameters for module in graph.modules.values()),
            reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        )
