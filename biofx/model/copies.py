"""Copies of modules and graphs: in memory, and as plain records for pickles."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.fx.node import map_aggregate, map_arg

from biofx.torch_private import codegen_of, tracer_of

Module = TypeVar("Module", bound=nn.Module)
_PICKLED_META = ("nn_module_stack", "stack_trace", "custom")


def deep_copy(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Return a copy of a module, ``copy.deepcopy(module, memo)`` after :func:`prepared`."""
    return copy.deepcopy(module, prepared(module, {} if memo is None else memo))


def prepared(module: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Fill a memo of ``copy.deepcopy`` for a module, so that it takes less time and accepts more models.

    A module holds a dozen tables of hooks, most of them empty, on which ``copy.deepcopy`` spends most of its
    time. It also refuses modules of Python, which are not copied, and computed tensors, which hooks such as
    those of ``torch.nn.utils.weight_norm`` leave in a layer; their values are copied, without their history.

    Args:
        module: the module to copy.
        memo: of ``copy.deepcopy``; filled in place.

    Returns:
        ``memo``.
    """
    for inner in module.modules():
        for value in (*vars(inner).values(), *inner._buffers.values()):
            if type(value) is OrderedDict and not value:
                memo.setdefault(id(value), OrderedDict())
            elif type(value) is ModuleType:
                memo.setdefault(id(value), value)
            elif issubclass(type(value), Tensor) and value.grad_fn is not None:
                memo.setdefault(id(value), value.detach().clone())
    return memo


def copy_graph(graph: Graph) -> Graph:
    """Return a copy of a graph, with the same names."""
    copied = Graph(tracer_cls=tracer_of(graph))
    copied.set_codegen(copy.deepcopy(codegen_of(graph)))
    mapping: dict[Node, Node] = {}
    for node in graph.nodes:
        mapping[node] = copied.node_copy(node, lambda source: mapping[source])
    return copied


def pack(graph: Graph, meta: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """Return a graph as plain records; pickling nodes themselves would recurse once per node.

    Args:
        graph: the graph.
        meta: further keys of the ``meta`` of nodes to keep.
    """
    records = [
        (
            node.op,
            node.target,
            *(map_arg(given, lambda source: _Reference(source.name)) for given in (node.args, node.kwargs)),  # type: ignore[arg-type,return-value]
            node.name,
            node.type,
            {key: _plain_meta(node.meta[key]) for key in (*_PICKLED_META, *meta) if key in node.meta},
        )
        for node in graph.nodes
    ]
    return records, codegen_of(graph)


class _Reference:
    """A node in a packed graph, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name


def _plain_meta(value: Any) -> Any:
    """Replace the classes in a module stack by their names: a user's class may be a local one."""
    if not isinstance(value, Mapping) or any(isinstance(entry, Tensor) for entry in value.values()):
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
    graph.set_codegen(codegen)
    nodes: dict[str, Node] = {}

    def resolved(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Reference) else value

    for op, target, args, kwargs, name, kind, meta in records:
        node = graph.create_node(
            op, target, map_aggregate(args, resolved), map_aggregate(kwargs, resolved), name, kind
        )
        node.meta.update(meta)
        nodes[name] = node
    return graph
