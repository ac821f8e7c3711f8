"""The weight that a layer really uses: the parameter after what the graph does to its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from biofx import ops
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.placement import bio_module_path
from biofx.regions import whole_graph

Effective = Callable[[Tensor], Tensor]
"""Computes from a parameter the weight that the layer uses, of the same shape."""


def effective_weights(graph_module: GraphModule, states: Mapping[str, BioModule]) -> dict[str, Effective]:
    """Return how each weight of ``states`` becomes the one that its layer uses, by path.

    Only sign constraints change a weight's values on the way; one without is used as it is.
    """
    paths = {f"{bio_module_path(path)}.sign": path for path in states}
    effective: dict[str, Effective] = dict.fromkeys(states, unchanged)
    for node in whole_graph(graph_module).find_nodes(op="call_function", target=ops.constrain_sign):
        sign = node.args[1] if len(node.args) > 1 else None
        path = paths.get(str(sign.target)) if isinstance(sign, Node) else None
        if path is not None:
            effective[path] = _Constrained(states[path], dict(node.kwargs))
    return effective


def unchanged(weight: Tensor) -> Tensor:
    """Return the weight."""
    return weight


@dataclass(frozen=True)
class _Constrained:
    """Applies a graph's sign constraint, with its options there."""

    state: BioModule
    options: dict[str, Any]

    def __call__(self, weight: Tensor) -> Tensor:
        sign = self.state.sign
        return weight if sign is None else ops.constrain_sign(weight, sign, **self.options)
