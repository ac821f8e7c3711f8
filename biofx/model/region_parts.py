"""One graph during a rewrite for a model that has several; see :mod:`biofx.graph.regions`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.node import map_arg

from biofx.errors import PassError
from biofx.graph.graph_functions import EAGER_FORWARD, OWN_MODULE, call_own_forward, call_with_parameters
from biofx.graph.guards import require_default
from biofx.graph.joined_graph import whole_graph
from biofx.graph.regions import (
    ELSEWHERE,
    JOINED,
    begin_region,
    is_inside,
    is_joined,
    region_input,
    region_of_nodes,
    region_output,
    region_paths,
)
from biofx.model.graph_module import BioGraphModule, become_graph_module
from biofx.torch_private import codegen_of


@contextmanager
def joined(graph_module: GraphModule) -> Iterator[None]:
    """Join the graphs of a model and its regions into one, and divide it again at the end.

    A model of one graph is not changed, nor is one that is joined already.
    """
    if not region_paths(graph_module) or is_joined(graph_module):
        yield
        return
    root: Any = graph_module
    root.graph = whole_graph(graph_module)
    vars(graph_module)[JOINED] = True
    try:
        yield
    finally:
        del vars(graph_module)[JOINED]
        _divide(root)


def _divide(root: BioGraphModule) -> None:
    """Move each region's part of a joined graph back to the region."""
    whole = root.graph
    regions = region_of_nodes(whole)
    modules = dict(root.named_modules(remove_duplicate=False))
    main = Graph(tracer_cls=Tracer)
    main.set_codegen(codegen_of(whole))
    parts: dict[str, _Part] = {}
    mapping: dict[Node, Node] = {}
    for node in whole.nodes:
        path = regions.get(node)
        if path is None:
            mapping[node] = main.node_copy(node, mapping.__getitem__)
        else:
            parts.setdefault(path, _Part(path, _others(path, modules))).take(node)
    for path, part in parts.items():
        if isinstance(modules[path], BioGraphModule) or not part.is_a_bare_layer:
            held = modules[path].__dict__.setdefault(ELSEWHERE, SimpleNamespace())
            for other, name in part.read_elsewhere.items():
                setattr(held, name, modules[other])
            become_graph_module(modules[path], part.graph)
    root.graph = main


def _others(path: str, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the names under which a region reads modules outside of it, by their paths."""
    held = vars(vars(modules[path]).get(ELSEWHERE, SimpleNamespace()))
    return {
        other: f"{ELSEWHERE}.{name}"
        for name, module in held.items()
        for other, found in modules.items()
        if found is module
    }


def _is_state(path: str) -> bool:
    """Whether a path is that of a weight's plasticity state, which holds the signs of the layer's units."""
    return "bio_mod" in path.split(".")


class _Part:
    """One region's part of a joined graph, with paths relative to the region."""

    def __init__(self, path: str, others: Mapping[str, str]) -> None:
        self._path = path
        self._others = dict(others)
        self.read_elsewhere: dict[str, str] = {}
        """Paths of the states outside of the region whose signs it reads, and the names they get there."""
        self._mapping: dict[Node, Node] = {}
        self.graph = Graph(tracer_cls=Tracer)
        self._calls_itself: list[Node] = []

    @property
    def is_a_bare_layer(self) -> bool:
        """Whether the region is one call of a layer or a Python forward, unchanged."""
        nodes = [node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
        return [node for node in nodes if node.target is not require_default] == self._calls_itself != []

    def take(self, node: Node) -> None:
        """Copy a node into the region's own graph."""
        if node.target is begin_region:
            return
        args: Any = map_arg(node.args, self._mapping.__getitem__)
        kwargs: Any = map_arg(node.kwargs, self._mapping.__getitem__)
        if node.target is region_input:
            new = self.graph.create_node("placeholder", args[1], args[2:])
        elif node.target is region_output:
            new = self.graph.output(args[1])
        elif node.op == "call_module" and node.target == self._path:
            new = self._call_of_itself(node, call_own_forward, args, kwargs)
        elif node.target is call_with_parameters:
            new = self._call_of_itself(node, call_with_parameters, *args[1:])
        else:
            new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
            if node.op in ("call_module", "get_attr"):
                new.target = self._local(str(node.target), node)
        new.meta = {**node.meta, "nn_module_stack": self._local_stack(node)}
        self._mapping[node] = new

    def _call_of_itself(self, node: Node, call: Callable[..., Any], *given: Any) -> Node:
        own = self.graph.create_node("get_attr", EAGER_FORWARD)
        new = self.graph.create_node("call_function", call, (own, *given), name=node.name)
        self._calls_itself.append(new)
        return new

    def _local(self, path: str, node: Node) -> str:
        if path == self._path:
            return OWN_MODULE
        owner, _, name = path.rpartition(".")
        if owner not in self._others and not is_inside(path, self._path) and _is_state(owner):
            self.read_elsewhere[owner] = owner.replace(".", "_")
            self._others[owner] = f"{ELSEWHERE}.{self.read_elsewhere[owner]}"
        if owner in self._others and not path.startswith(f"{self._path}."):
            return f"{self._others[owner]}.{name}"
        if not path.startswith(f"{self._path}."):
            raise PassError(f"{node.name!r} reads {path!r}, which is outside of its region {self._path!r}")
        return path[len(self._path) + 1 :]

    def _local_stack(self, node: Node) -> dict[str, Any]:
        start = f"{self._path}."
        stack = node.meta.get("nn_module_stack") or {}
        return {
            key[len(start) :]: (place[len(start) :], kind)
            for key, (place, kind) in stack.items()
            if place.startswith(start)
        }
