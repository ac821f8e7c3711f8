"""A pass of one's own: neurons cannot fire at any rate, so ``relu`` becomes ``clamp`` with a ceiling."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

import biofx


@dataclass(frozen=True, kw_only=True)
class BoundRates(biofx.Pass):
    """Turn ``relu`` into ``clamp`` between 0 and a ceiling."""

    name: ClassVar[str] = "bound-rates"
    ceiling: float = 6.0
    """Highest rate, in units of the activation."""

    def rewrite(self, graph_module: biofx.BioGraphModule, scope: biofx.Scope) -> Iterator[biofx.Remark]:
        """Rewrite every call of ``torch.relu`` that is selected."""
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.relu):
            options = scope.options(self, node, "")
            if isinstance(options, str):
                yield biofx.missed(node, "", options)
                continue
            node.target, node.args = torch.clamp, (node.args[0], 0.0, options.ceiling)
            yield biofx.applied(node, "", f"bounded by {options.ceiling}")
