"""The rewritten model: a ``torch.fx.GraphModule`` that stays as close to the original as one can."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from biofx.errors import InputError

_OWN_TO_GRAPH_MODULES = frozenset({"_graph", "_code", "_tracer_cls", "_tracer_extras"})
_PICKLED_META = ("nn_module_stack", "stack_trace", "custom")


class BioGraphModule(GraphModule):
    """A graph module that keeps what a plain one drops.

    The whole module tree stays in its order, used by the graph or not, and with it state-dict keys,
    parameter order, persistence of buffers, the model's own hooks and attributes. Copies and pickles carry
    the graph itself, not its code, so nothing is traced a second time and no node changes its name.
    """

    @classmethod
    def from_root(cls, root: nn.Module, graph: Graph, class_name: str | None = None) -> BioGraphModule:
        """Take over everything ``root`` holds (without copying it) and compute with ``graph``."""
        made = cls(nn.Module(), Graph(), class_name or type(root).__name__)
        kept = {name: value for name, value in vars(root).items() if name not in _OWN_TO_GRAPH_MODULES}
        vars(made).update(kept)
        made.graph = graph
        return made

    @classmethod
    def copy_of(cls, graph_module: GraphModule, memo: dict[int, Any] | None = None) -> BioGraphModule:
        """Return an independent copy of any graph module.

        Raises:
            InputError: the module holds something that cannot be copied.
        """
        memo = {} if memo is None else memo
        own = {name: value for name, value in vars(graph_module).items() if name != "_graph"}
        root = nn.Module()
        memo[id(graph_module)] = made = cls(root, Graph(), type(graph_module).__name__)
        try:
            vars(root).update(copy.deepcopy(own, memo))
        except RuntimeError as error:
            raise InputError(f"expected a model that can be copied: {error}") from error
        vars(made).update(
            {name: value for name, value in vars(root).items() if name not in _OWN_TO_GRAPH_MODULES}
        )
        made.graph = _copy_graph(graph_module.graph)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> BioGraphModule:
        return type(self).copy_of(self, memo)

    def __copy__(self) -> BioGraphModule:
        return type(self).from_root(self, _copy_graph(self.graph), type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name not in _OWN_TO_GRAPH_MODULES}
        return _rebuild, (type(self).__name__, state, _pack(self.graph), self.graph._codegen)


def _copy_graph(graph: Graph) -> Graph:
    copied = Graph(tracer_cls=graph._tracer_cls)
    copied._codegen = copy.deepcopy(graph._codegen)
    mapping: dict[Node, Node] = {}
    for node in graph.nodes:
        mapping[node] = copied.node_copy(node, lambda source: mapping[source])
    return copied


def _pack(graph: Graph) -> list[tuple[Any, ...]]:
    """Return the nodes as plain records; pickling them as they are would recurse once per node."""
    return [
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


def _rebuild(
    class_name: str, state: dict[str, Any], packed: list[tuple[Any, ...]], codegen: Any
) -> BioGraphModule:
    graph = Graph()
    graph._codegen = codegen
    nodes: dict[str, Node] = {}
    for op, target, args, kwargs, name, kind, meta in packed:
        node = graph.create_node(op, target, _resolve(args, nodes), _resolve(kwargs, nodes), name, kind)
        node.meta.update(meta)
        nodes[name] = node
    root = nn.Module()
    vars(root).update(state)
    return BioGraphModule.from_root(root, graph, class_name)


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
