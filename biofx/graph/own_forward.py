"""Graphs of modules that run the forward of their class: what Python decides stays with Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Tracer

OWN_FORWARD = "own_forward"
"""The attribute of a graph module that is its class's forward."""


def call_own_forward(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a module's own forward from its graph."""
    return forward(*args, **kwargs)


def call_with_parameters(
    forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> Any:
    """Run a module's own forward with expressions in the place of its parameters.

    Args:
        forward: the forward, bound to the module by ``functools.partial``; in a joined graph, the path of
            the module.
        args: positional arguments.
        kwargs: keyword arguments.
        parameters: by name what the module finds instead.
    """
    held = vars(forward.args[0])
    held.update(parameters)  # an attribute of its own hides the parameter, which stays where it is
    try:
        return forward(*args, **kwargs)
    finally:
        for name in parameters:
            held.pop(name, None)


def call_with_weights(layer: nn.Module, given: Any, weights: Mapping[str, Tensor]) -> Any:
    """Call a layer that finds expressions in the place of its weights, whatever its forward is by now.

    Args:
        layer: has weights of these names.
        given: its input.
        weights: by name what the layer finds instead, for as long as the call takes.
    """
    held = vars(layer)
    before = {name: held[name] for name in weights if name in held}
    held.update(weights)
    try:
        return layer(given)
    finally:
        for name in weights:
            held.pop(name, None)
        held.update(before)


def parameters_graph(names: Iterable[str]) -> Graph:
    """Return a graph that runs the forward of the module's class on the parameters of these names."""
    graph = Graph(tracer_cls=Tracer)
    args = graph.create_node("placeholder", "*args")
    kwargs = graph.create_node("placeholder", "**kwargs")
    forward = graph.create_node("get_attr", OWN_FORWARD)
    reads = {name: graph.create_node("get_attr", name) for name in names}
    graph.output(graph.call_function(call_with_parameters, (forward, args, kwargs, reads)))
    return graph


def own_forward_graph() -> Graph:
    """Return a graph that runs the forward of the module's class, on whatever it is given."""
    graph = Graph(tracer_cls=Tracer)
    args = graph.create_node("placeholder", "*args")
    kwargs = graph.create_node("placeholder", "**kwargs")
    forward = graph.create_node("get_attr", OWN_FORWARD)
    graph.output(graph.call_function(call_own_forward, (forward, args, kwargs)))
    return graph
