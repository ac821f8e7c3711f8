"""The way back from lowering: ``linear(x, weight, bias)`` becomes a call of an ``nn.Linear`` again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from biofx.deploy.plain_modules import take_hooks
from biofx.graph.regions import region_paths
from biofx.layers import kind_of_call
from biofx.layers.constant_part import erase_unused_reads
from biofx.layers.layer_kind import LayerCall, LoweredCall, NotHeld
from biofx.layers.norms import norm_kind_of_call
from biofx.layers.single_weight import DENSE_KINDS
from biofx.layers.sites import innermost_path
from biofx.layers.weight_site import computed_behind


def raise_layers(graph_module: GraphModule) -> None:
    """Call each layer that was lowered as a module again.

    The module is a new one, at the path of the old one unless the graph still needs what is there. Calls with
    different weights become calls of different modules.
    """
    _call_parametrized(graph_module)
    layers = dict(graph_module.named_modules(remove_duplicate=False))
    raised = {
        node: call for node in graph_module.graph.nodes if (call := _raised(node, graph_module, layers))
    }
    places = _Places(graph_module, set(raised), layers)
    for node, call in raised.items():
        node.target = places.place(call)
        node.op, node.args, node.kwargs = "call_module", call.args, dict(call.kwargs)
    erase_unused_reads(graph_module)


def _raised(node: Node, graph_module: GraphModule, layers: Mapping[str, nn.Module]) -> LayerCall | None:
    """Return the module's call that does what a node does; None if it is no layer's, or was no module's."""
    path = innermost_path(node)
    kind, before = kind_of_call(node) or norm_kind_of_call(node), layers.get(path)
    if node.op != "call_function" or kind is None or not path or before is None:
        return None
    try:
        return kind.raised(LoweredCall(node, graph_module, path, before))
    except NotHeld:
        return None


def _call_parametrized(graph_module: GraphModule) -> None:
    """Call each layer again whose weight a parametrization computes and nothing else changes."""
    for node in list(graph_module.graph.nodes):
        kind = kind_of_call(node)
        weight = node.args[1] if kind in DENSE_KINDS and len(node.args) > 1 else None
        path = computed_behind(weight)
        if path is None or not isinstance(weight, Node) or weight.target is not getattr:
            continue
        layer = path.rpartition(".")[0]
        if getattr(graph_module.get_submodule(layer), "padding_mode", "zeros") == "zeros":
            node.op, node.target, node.args, node.kwargs = "call_module", layer, (node.args[0],), {}
            graph_module.graph.erase_node(weight)


@dataclass
class _Places:
    """Where in the tree the layers go."""

    graph_module: GraphModule
    leaving: set[Node]
    """Nodes that will no longer read what they read now."""
    before: dict[str, nn.Module]
    """The modules by their paths, before any is replaced."""
    _taken: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        staying = [node for node in self.graph_module.graph.nodes if node not in self.leaving]
        called = {str(node.target) for node in staying if node.op == "call_module"}
        self._called = called.difference(region_paths(self.graph_module))  # a region may be replaced
        self._read = {
            str(node.target)
            for node in staying
            if node.op == "get_attr" and any(user not in self.leaving for user in node.users)
        }

    def place(self, call: LayerCall) -> str:
        """Return the path of the layer of a call, which is made if there is none yet."""
        number = 0
        while True:
            path = f"{call.path}_{number}" if number else call.path
            if self._taken.get(path) == call.key:
                return path
            if path not in self._taken and self._is_free(path, call, original=number == 0):
                self._taken[path] = call.key
                self._put(path, call.module())
                return path
            number += 1

    def _put(self, path: str, made: nn.Module) -> None:
        """Put a layer at a path, with the hooks of the module there.

        A region is replaced at all its paths, and the modules that it calls besides are kept.
        """
        paths = [path]
        before = self.before.get(path)
        if before is not None:
            take_hooks(made, before)
        if before is not None and path in region_paths(self.graph_module):
            for name, module in before.named_children():
                made._modules.setdefault(name, module)
            everything = self.graph_module.named_modules(remove_duplicate=False)
            paths = [place for place, module in everything if module is before]
        for place in paths:
            owner, _, name = place.rpartition(".")
            self.graph_module.get_submodule(owner).add_module(name, made)

    def _is_free(self, path: str, call: LayerCall, *, original: bool) -> bool:
        if not original:
            owner, _, name = path.rpartition(".")
            return not hasattr(self.graph_module.get_submodule(owner), name)
        for read in (read for read in self._read if read.startswith(f"{path}.")):
            if call.held.get(read[len(path) + 1 :]) is not _value(self.graph_module, read):
                return False
        return not any(called == path or called.startswith(f"{path}.") for called in self._called)


def _value(graph_module: GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)
