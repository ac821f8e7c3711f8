"""The way back from lowering: ``linear(x, weight, bias)`` becomes a call of an ``nn.Linear`` again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from biofx.layer_kinds import KIND_OF_FUNCTION, LayerKind
from biofx.lowering import OPTIONS
from biofx.sites import innermost_path
from biofx.weight_values import erase_unused_reads

_Key = tuple[int, int, str]
"""Identity of weight and bias, and the options: what makes two calls calls of one layer."""


def raise_layers(graph_module: GraphModule) -> None:
    """Let each layer that was lowered be called as a module again.

    The module is a new one, at the path of the old one where nothing else in the graph needs what is there;
    calls with different weights become calls of different modules.
    """
    layers = dict(graph_module.named_modules(remove_duplicate=False))
    raised = {
        node: call for node in graph_module.graph.nodes if (call := _LayerCall.of(node, graph_module, layers))
    }
    places = _Places(graph_module, set(raised))
    for node, call in raised.items():
        node.target = places.place(call)
        node.op, node.args, node.kwargs = "call_module", (node.args[0],), {}
    erase_unused_reads(graph_module)


@dataclass
class _LayerCall:
    """A call of a layer's function on parameters."""

    kind: LayerKind
    path: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    options: dict[str, Any]

    @classmethod
    def of(cls, node: Node, graph_module: GraphModule, layers: Mapping[str, nn.Module]) -> _LayerCall | None:
        """Return what a node calls; None where it is no layer's call, or never was a module's."""
        kind = KIND_OF_FUNCTION.get(node.target) if node.op == "call_function" else None
        path = innermost_path(node)
        if kind is None or not path or not isinstance(layers.get(path), kind.module_type):
            return None
        if len(node.args) not in (2, 3) or not set(node.kwargs) <= set(OPTIONS):
            return None
        parameters = [_parameter(source, graph_module) for source in node.args[1:]]
        if any(parameter is None for parameter in parameters):
            return None
        weight, bias = parameters[0], parameters[1] if len(parameters) > 1 else None
        return cls(kind, path, weight, bias, dict(node.kwargs)) if weight is not None else None

    @property
    def key(self) -> _Key:
        """What makes two calls calls of one layer."""
        return id(self.weight), id(self.bias), repr(sorted(self.options.items()))

    def module(self) -> nn.Module:
        """Make the layer."""
        shape, groups = self.weight.shape, self.options.get("groups", 1)
        ends = (shape[0], shape[1] * groups) if self.kind.transposed else (shape[1] * groups, shape[0])
        kernel = (tuple(shape[2:]),) if self.kind.kernel_axes else ()
        make: Any = self.kind.module_type
        made: nn.Module = make(*ends, *kernel, bias=self.bias is not None, device="meta", **self.options)
        made.register_parameter("weight", self.weight)
        made.register_parameter("bias", self.bias)
        return made


@dataclass
class _Places:
    """Where in the tree the layers go."""

    graph_module: GraphModule
    leaving: set[Node]
    """Nodes that will not read what they read now."""
    _taken: dict[str, _Key] = field(default_factory=dict)

    def __post_init__(self) -> None:
        staying = [node for node in self.graph_module.graph.nodes if node not in self.leaving]
        self._called = {str(node.target) for node in staying if node.op == "call_module"}
        self._read = {
            str(node.target)
            for node in staying
            if node.op == "get_attr" and any(user not in self.leaving for user in node.users)
        }

    def place(self, call: _LayerCall) -> str:
        """Return where a layer is that does what a call does, made if there is none."""
        number = 0
        while True:
            path = f"{call.path}_{number}" if number else call.path
            if self._taken.get(path) == call.key:
                return path
            if path not in self._taken and self._is_free(path, call, original=number == 0):
                self._taken[path] = call.key
                owner, _, name = path.rpartition(".")
                self.graph_module.get_submodule(owner).add_module(name, call.module())
                return path
            number += 1

    def _is_free(self, path: str, call: _LayerCall, *, original: bool) -> bool:
        if not original:
            owner, _, name = path.rpartition(".")
            return not hasattr(self.graph_module.get_submodule(owner), name)
        same = {"weight": call.weight, "bias": call.bias}
        for read in (read for read in self._read if read.startswith(f"{path}.")):
            if same.get(read[len(path) + 1 :]) is not _value(self.graph_module, read):
                return False
        return not any(called == path or called.startswith(f"{path}.") for called in self._called)


def _parameter(source: Any, graph_module: GraphModule) -> nn.Parameter | None:
    if not isinstance(source, Node) or source.op != "get_attr":
        return None
    value = _value(graph_module, str(source.target))
    return value if isinstance(value, nn.Parameter) else None


def _value(graph_module: GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)
