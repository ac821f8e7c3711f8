"""Graphs of modules that run the forward of their class: what Python decides stays with Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Graph, Tracer

OWN_FORWARD = "own_forward"
"""The attribute of a graph module that is its class's forward."""


def call_own_forward(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a module's own forward from its graph."""
    return forward(*args, **kwargs)


def own_forward_graph() -> Graph:
    """Return a graph that runs the forward of the module's class, on whatever it is given."""
    graph = Graph(tracer_cls=Tracer)
    args = graph.create_node("placeholder", "*args")
    kwargs = graph.create_node("placeholder", "**kwargs")
    forward = graph.create_node("get_attr", OWN_FORWARD)
    graph.output(graph.call_function(call_own_forward, (forward, args, kwargs)))
    return graph
