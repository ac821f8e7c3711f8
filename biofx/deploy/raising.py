"""The way back from lowering: ``linear(x, weight, bias)`` becomes a call of an ``nn.Linear`` again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from biofx.deploy.plain_modules import take_hooks
from biofx.deploy.raised_calls import LayerCall
from biofx.graph.regions import region_paths
from biofx.layers.layer_kinds import LAYER_KINDS, kind_of_call
from biofx.layers.weight_site import computed_behind
from biofx.layers.weight_values import erase_unused_reads


def raise_layers(graph_module: GraphModule) -> None:
    """Let each layer that was lowered be called as a module again.

    The module is a new one, at the path of the old one where nothing else in the graph needs what is there;
    calls with different weights become calls of different modules.
    """
    _call_parametrized(graph_module)
    layers = dict(graph_module.named_modules(remove_duplicate=False))
    raised = {
        node: call for node in graph_module.graph.nodes if (call := LayerCall.of(node, graph_module, layers))
    }
    places = _Places(graph_module, set(raised), layers)
    for node, call in raised.items():
        node.target = places.place(call)
        node.op, node.args, node.kwargs = "call_module", call.args, dict(call.kwargs)
    erase_unused_reads(graph_module)


def _call_parametrized(graph_module: GraphModule) -> None:
    """Let each layer be called again whose weight a parametrization computes and nothing else changes."""
    for node in list(graph_module.graph.nodes):
        kind = kind_of_call(node)
        weight = node.args[1] if kind in LAYER_KINDS and len(node.args) > 1 else None
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
    """Nodes that will not read what they read now."""
    before: dict[str, nn.Module]
    """The modules by their paths, as they are before any is put in the place of another."""
    _taken: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        staying = [node for node in self.graph_module.graph.nodes if node not in self.leaving]
        called = {str(node.target) for node in staying if node.op == "call_module"}
        self._called = called - {
            *region_paths(self.graph_module)
        }  # who calls a region calls what is put there
        self._read = {
            str(node.target)
            for node in staying
            if node.op == "get_attr" and any(user not in self.leaving for user in node.users)
        }

    def place(self, call: LayerCall) -> str:
        """Return where a layer is that does what a call does, made if there is none."""
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
        """Put a layer at a path, with the hooks of what is there.

        In the place of a region it goes everywhere, with what the region calls besides.
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
