"""Graphs as plain records and back, for pickles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Graph, Node, Tracer
from torch.fx.node import map_arg

_PICKLED_META = ("nn_module_stack", "stack_trace", "custom")


def pack(graph: Graph) -> tuple[Any, ...]:
    """Return a graph as plain records; pickling the nodes as they are would recurse once per node."""
    records = [
        (
            node.op,
            node.target,
            map_arg(node.args, lambda source: _Reference(source.name)),  # type: ignore[arg-type,return-value]
            map_arg(node.kwargs, lambda source: _Reference(source.name)),  # type: ignore[arg-type,return-value]
            node.name,
            node.type,
            {key: _plain_meta(node.meta[key]) for key in _PICKLED_META if key in node.meta},
        )
        for node in graph.nodes
    ]
    return records, graph._codegen


class _Reference:
    """Stands for a node in a packed graph."""

    def __init__(self, name: str) -> None:
        self.name = name


def _plain_meta(value: Any) -> Any:
    """Name the classes in a module stack instead of carrying them: a user's class may be a local one."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: (
            entry[0],
            entry[1] if isinstance(entry[1], str) else f"{entry[1].__module__}.{entry[1].__qualname__}",
        )
        if isinstance(entry, tuple) and len(entry) == 2
        else entry
        for key, entry in value.items()
    }


def unpack(packed: tuple[Any, ...]) -> Graph:
    """Return the graph that was packed, with the same node names."""
    records, codegen = packed
    graph = Graph(tracer_cls=Tracer)
    graph._codegen = codegen
    nodes: dict[str, Node] = {}
    for op, target, args, kwargs, name, kind, meta in records:
        node = graph.create_node(op, target, _resolve(args, nodes), _resolve(kwargs, nodes), name, kind)
        node.meta.update(meta)
        nodes[name] = node
    return graph


def _resolve(value: Any, nodes: Mapping[str, Node]) -> Any:
    if isinstance(value, _Reference):
        return nodes[value.name]
    if isinstance(value, (tuple, list)):
        entries = [_resolve(entry, nodes) for entry in value]
        if hasattr(value, "_fields"):
            return type(value)(*entries)
        return tuple(entries) if isinstance(value, tuple) else entries
    if isinstance(value, dict):
        return {key: _resolve(entry, nodes) for key, entry in value.items()}
    if isinstance(value, slice):
        return slice(*(_resolve(bound, nodes) for bound in (value.start, value.stop, value.step)))
    return value
