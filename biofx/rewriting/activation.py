"""Put a user's activation into a graph: as nodes where it can be traced, as one call where it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Node

from biofx.callables import identity
from biofx.capture.capture import trace_function
from biofx.errors import CaptureError
from biofx.layers.weight_site import WeightSite
from biofx.plasticity.model_states import bio_module_at, bio_module_path
from biofx.torch_private import rename

SPLITTING_ACTIVATION = "splitting_activation"
"""What a layer's ``bio_mod`` calls the activation that is applied before its synapses are summed."""


class OpaqueActivation(nn.Module):
    """Calls a function that cannot be looked into."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        """Return ``function(x)``."""
        return self.function(x)


def insert_activation(site: WeightSite, activation: Callable[[Any], Any] | str) -> Node:
    """Insert ``activation`` behind a layer and return its last node; its users still read the layer.

    A function is traced and its operations become nodes. A module, or a function that tracing cannot see
    into, becomes one call of a module kept in the layer's ``bio_mod``, a copy for each layer.
    """
    if activation is identity or type(activation) is nn.Identity or isinstance(activation, str):
        return site.node
    if not isinstance(activation, nn.Module):
        try:
            return _inline(site.node, activation)
        except CaptureError:
            pass
    model: Any = site.node.graph.owning_module
    state = bio_module_at(model, site.parameter_path)
    if SPLITTING_ACTIVATION not in state._modules:
        own = copy.deepcopy(activation) if isinstance(activation, nn.Module) else OpaqueActivation(activation)
        state.add_module(SPLITTING_ACTIVATION, own)
    path = f"{bio_module_path(site.parameter_path)}.{SPLITTING_ACTIVATION}"
    with site.node.graph.inserting_after(site.node):
        node = site.node.graph.create_node(
            "call_module", path, (site.node,), {}, f"{site.node.name}_activated"
        )
    node.meta = {key: value for key, value in site.node.meta.items() if key == "nn_module_stack"}
    return node


def _inline(layer: Node, activation: Callable[[Any], Any]) -> Node:
    """Copy the operations of a traced function behind ``layer``, each named after it."""
    traced = trace_function(activation)
    if any(node.op in ("get_attr", "call_module") for node in traced.nodes):
        raise CaptureError("expected a function of its argument alone")
    place = layer
    mapping: dict[Node, Node] = {}
    for node in traced.nodes:
        if node.op == "placeholder":
            mapping[node] = layer
        elif node.op == "output":
            result = node.args[0]
            if isinstance(result, Node):
                return mapping[result]
        else:
            with layer.graph.inserting_after(place):
                place = layer.graph.node_copy(node, lambda source: mapping[source])
            rename(place, f"{layer.name}_activated")
            place.meta = {key: value for key, value in layer.meta.items() if key == "nn_module_stack"}
            mapping[node] = place
    raise CaptureError("expected a function that returns one tensor")
