"""Inputs and outputs of an exported program, as a forward has them, and what its sizes must be."""

from __future__ import annotations

import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.graph import CodeGen

from biofx.errors import CaptureError
from biofx.graph.guards import require_exported
from biofx.torch_private import codegen_of, pytree

_NO_LIMIT = 2**31
"""From here on an upper limit of a size is none."""
Ranges = Mapping[Any, Any]
"""Of sizes that may differ, by their symbols: what torch calls value ranges."""


def take_plain_signature(graph: Graph, ranges: Ranges) -> None:
    """Let a graph take the arguments that the model took, and return what the model returned.

    An exported graph takes the tensors in its arguments one by one, and code around it takes the arguments
    apart; other code checks sizes. Both become nodes.

    Args:
        graph: changed in place.
        ranges: within which sizes may be that are not fixed.

    Raises:
        CaptureError: an argument is, or a result has, a container of a class that a graph cannot look into,
            or a size follows from others by a formula.
    """
    inputs = graph.find_nodes(op="placeholder")
    info = getattr(codegen_of(graph), "pytree_info", None)
    start = next(node for node in graph.nodes if node.op != "placeholder")
    taken = {node.name: node for node in inputs}
    if info is not None:
        taken = dict(_take_arguments(graph, start, inputs, info))
        (output,) = graph.find_nodes(op="output")
        output.args = (_result(graph, output, info.out_spec),)
        graph.set_codegen(CodeGen())
    _check_inputs(graph, start, taken, ranges)


def _take_arguments(graph: Graph, start: Node, inputs: list[Node], info: Any) -> Iterator[tuple[str, Node]]:
    """Replace an input for each tensor by one for each argument; yield the tensors with their names."""
    args, kwargs = pytree.tree_unflatten(inputs, info.in_spec)
    names = [name for name in info.orig_args if name != "self"]
    if len(names) != len(args) + len(kwargs):
        names = [*(f"input_{place}" for place in range(len(args))), *kwargs]
    arguments = dict(zip(names, (*args, *kwargs.values()), strict=True))
    wholes = {}
    for name, value in arguments.items():
        if isinstance(value, Node):
            start.prepend(value)
            value.target, wholes[name] = name, value
        else:
            with graph.inserting_before(start):
                wholes[name] = graph.placeholder(name)
    for name, value in arguments.items():
        yield from _take_apart(graph, start, wholes[name], value, name)


def _take_apart(graph: Graph, start: Node, whole: Node, value: Any, name: str) -> Iterator[tuple[str, Node]]:
    if isinstance(value, Node):
        if value is not whole:
            whole.meta = dict(value.meta)
            value.replace_all_uses_with(whole)
            graph.erase_node(value)
        yield name, whole
        return
    if type(value) not in (tuple, list, dict):
        raise CaptureError(
            f"argument {name!r} of the exported program is a {type(value).__name__}, which a graph cannot "
            "look into; export a model that takes tensors, tuples, lists or dicts"
        )
    entries: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        with graph.inserting_before(start):
            part = graph.call_function(operator.getitem, (whole, key))
        yield from _take_apart(graph, start, part, entry, f"{name}[{key!r}]")


def _result(graph: Graph, output: Node, spec: Any) -> Any:
    """Return what an output node returns: the model's result, with its containers."""
    flat: Any = output.args[0]
    found = pytree.tree_unflatten(list(flat), spec)

    def called(function: Any, *args: Any, **kwargs: Any) -> Node:
        with graph.inserting_before(output):
            return graph.call_function(function, args, kwargs)

    def built(value: Any) -> Any:
        kind: Any = type(value)
        if kind is dict:
            return {key: built(entry) for key, entry in value.items()}
        if kind in (tuple, list):
            return kind(map(built, value))
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return kind(*map(built, value))
        if kind is OrderedDict:
            return called(OrderedDict, [(key, built(entry)) for key, entry in value.items()])
        if issubclass(kind, dict) and dataclasses.is_dataclass(kind):
            return called(kind, **{key: built(entry) for key, entry in value.items()})
        if isinstance(value, (Node, bool, int, float, str, type(None))):
            return value
        raise CaptureError(
            f"the exported program returns a {kind.__name__}, which a graph cannot build; export a model "
            "that returns tensors, tuples, lists or dicts"
        )

    return built(found)


def _check_inputs(graph: Graph, start: Node, inputs: Mapping[str, Node], ranges: Ranges) -> None:
    """Check each input: sizes that export made constants, those that are equal, and values that are fixed."""
    free: dict[str, Node] = {}
    for name, node in inputs.items():
        if "val" not in node.meta:
            continue
        value, limits = node.meta["val"], []
        if isinstance(value, torch.Tensor):
            expected: list[Any] = []
            for axis, size in enumerate(value.shape):
                symbol = _symbol(size, f"{name}.shape[{axis}]")
                expected.append(int(size) if symbol is None else free.get(str(symbol)))
                if symbol is not None and str(symbol) not in free:
                    with graph.inserting_before(start):
                        free[str(symbol)] = graph.call_method("size", (node, axis))
                    limits += [(axis, *bounds)] if (bounds := _bounds(ranges.get(symbol))) else []
            value = tuple(expected)
        elif not isinstance(value, (bool, int, float, str, type(None))):
            continue
        with graph.inserting_before(start):
            checked = (node, name, value, tuple(limits)) if limits else (node, name, value)
            graph.call_function(require_exported, checked)


def _symbol(size: Any, what: str) -> Any:
    """Return the symbol of a free size, None for a fixed one.

    Raises:
        CaptureError: the size follows from others by a formula.
    """
    if isinstance(size, int) or size.node.expr.is_Integer:
        return None
    if not size.node.expr.is_Symbol:
        raise CaptureError(
            f"the exported program takes {what} = {size}, a size that follows from others by a formula, "
            "which biofx does not check; export it with sizes that are fixed, free or equal to each other"
        )
    return size.node.expr


def _bounds(found: Any) -> tuple[int, int | None] | None:
    """Return the least and the greatest value that a free size may have, None where all are allowed."""
    if found is None:
        return None
    low = max(0, int(found.lower))
    high = int(found.upper) if found.upper.is_finite and found.upper < _NO_LIMIT else None
    return None if low < 2 and high is None else (low, high)
