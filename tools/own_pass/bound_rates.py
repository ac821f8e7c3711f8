"""A pass of one's own: neurons cannot fire at any rate, so ``relu`` becomes ``clamp`` with a ceiling."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

import biofx


@dataclass(frozen=True, kw_only=True)
class BoundRates(biofx.Pass):
    """Turn ``relu`` into ``clamp`` between 0 and a ceiling."""

    name: ClassVar[str] = "bound-rates"
    ceiling: float = 6.0
    """Highest rate, in units of the activation."""

    def candidates(self, graph_module: biofx.BioGraphModule) -> Iterable[Node]:
        """Return every call of ``torch.relu``."""
        return graph_module.graph.find_nodes(op="call_function", target=torch.relu)

    def rewrite_node(self, candidate: Node, options: "BoundRates") -> biofx.Remark:
        """Rewrite one of them."""
        candidate.target, candidate.args = torch.clamp, (candidate.args[0], 0.0, options.ceiling)
        return biofx.applied(candidate, "", f"bounded by {options.ceiling}")
