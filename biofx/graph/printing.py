"""Graphs as text: one line per node, the same on every version of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from biofx.graph.joined_graph import whole_graph

_OPERATOR_SIGNS = {
    "add": "+",
    "iadd": "+=",
    "sub": "-",
    "isub": "-=",
    "mul": "*",
    "imul": "*=",
    "truediv": "/",
    "floordiv": "//",
    "matmul": "@",
    "mod": "%",
    "pow": "**",
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}


def format_graph(graph: GraphModule | Graph) -> str:
    """Return a graph as text, one line per node.

    A parameter is printed as its path, a layer as a call of its path with its class as a comment, an operator
    as in Python. The text depends on the graph alone, not on the version of torch, so it can be compared with
    a stored one.

    >>> import biofx
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> print(format_graph(biofx.capture(model)))
    input_1 = input
    _0 = self.0(input_1)  # Linear
    _1 = self.1(_0)  # ReLU
    return _1
    """
    fx_graph = whole_graph(graph) if isinstance(graph, GraphModule) else graph
    return "\n".join(format_node(node) for node in fx_graph.nodes)


def format_node(node: Node) -> str:
    """Return one node as a line of text."""
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    note = _annotation(node)
    return f"{node.name} = {_expression(node)}{f'  # {note}' if note else ''}"


def _expression(node: Node) -> str:
    if node.op == "placeholder":
        return f"input (default {_value(node.args[0])})" if node.args else "input"
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.op == "call_method":
        receiver, *rest = node.args
        return f"{_value(receiver)}.{node.target}({_arguments(rest, node.kwargs)})"
    if node.op == "call_module":
        return f"self.{node.target}({_arguments(node.args, node.kwargs)})"
    name = function_name(node.target)
    if getattr(node.target, "__module__", None) == "_operator":
        if name == "getitem":
            return f"{_value(node.args[0])}[{_index(node.args[1])}]"
        if name in _OPERATOR_SIGNS:
            return f" {_OPERATOR_SIGNS[name]} ".join(_value(argument) for argument in node.args)
    return f"{name}({_arguments(node.args, node.kwargs)})"


def function_name(target: Callable[..., Any] | str) -> str:
    """Return a function's short name, the same on every version of torch."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", type(target).__name__))


def _arguments(args: Iterable[Any], kwargs: dict[str, Any]) -> str:
    return ", ".join([*map(_value, args), *(f"{key}={_value(value)}" for key, value in kwargs.items())])


def _value(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_value(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({_value(value.start)}, {_value(value.stop)}, {_value(value.step)})"
    if isinstance(value, (torch.dtype, torch.device, torch.layout)):
        return str(value)
    if callable(value):
        return function_name(value)
    return repr(value)


def _index(index: Any) -> str:
    if isinstance(index, tuple):
        return ", ".join(map(_index, index))
    if isinstance(index, slice):
        bounds = ["" if bound is None else _value(bound) for bound in (index.start, index.stop, index.step)]
        return ":".join(bounds if index.step is not None else bounds[:2])
    return "..." if index is ... else _value(index)


def _annotation(node: Node) -> str:
    """Return what a path leads to: the class of a layer, the shape of a parameter."""
    owner = node.graph.owning_module
    if owner is None or node.op not in ("call_module", "get_attr"):
        return ""
    found: Any = owner
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    if isinstance(found, nn.Module):
        return type(found).__name__
    return str(tuple(found.shape)) if isinstance(found, torch.Tensor) else ""
