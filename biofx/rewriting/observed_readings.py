"""Lets what weights read pass through the operators that observe it."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from biofx.analysis.units import Reading
from biofx.layers.layer_kind import argument
from biofx.layers.weight_site import WeightSite
from biofx.operators.observed_inputs import observe_inputs, observe_state
from biofx.plasticity.model_states import bio_module_path


def observe_reading(reading: Reading) -> None:
    """Let what a weight reads pass through the operator that observes it."""
    site, node = reading.site, reading.site.node
    if reading.layout is None:
        _observe_state(site)
        return
    source = argument(node, *site.kind.source)
    if not isinstance(source, Node) or source.target is observe_inputs:
        return  # another group of units that it reads has put it there
    options: dict[str, Any] = {"channel_axis": site.kind.channel_axis, "nonnegative": reading.nonnegative}
    with node.graph.inserting_before(node):
        seen = _buffers(site, node.name)
        watched = node.graph.call_function(observe_inputs, (source, *seen), options)
    _name(watched, f"{node.name}_watched", node)
    place, name = site.kind.source
    if len(node.args) > place:
        node.update_arg(place, watched)
    else:
        node.kwargs = {**node.kwargs, name: watched}


def _observe_state(site: WeightSite) -> None:
    """Let what a recurrent layer returns pass through the operator that observes its state."""
    node, users = site.node, list(site.node.users)
    options: dict[str, Any] = {"direction": site.slot.direction}
    with node.graph.inserting_after(node):
        watched = node.graph.call_function(observe_state, (node,), options)
    with node.graph.inserting_before(watched):
        watched.args = (node, *_buffers(site, f"{node.name}_{site.slot.name}"))
    _name(watched, f"{node.name}_{site.slot.name}_watched", node)
    for user in users:
        user.replace_input_with(node, watched)


def _buffers(site: WeightSite, stem: str) -> tuple[Node, Node]:
    """Return nodes that read what was seen, and whether to look."""
    graph, path = site.node.graph, bio_module_path(site.parameter_path)
    seen = graph.create_node("get_attr", f"{path}.input_activity", name=f"{stem}_seen")
    training = graph.create_node("get_attr", f"{path}.training", name=f"{stem}_watching")
    for made in (seen, training):
        _name(made, made.name, site.node)
    return seen, training


def _name(made: Node, name: str, near: Node) -> None:
    stack = near.meta.get("nn_module_stack")
    made.name, made.meta = name, {} if stack is None else {"nn_module_stack": stack}
