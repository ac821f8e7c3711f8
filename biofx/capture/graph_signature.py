"""The signature of a graph under construction: its inputs, from arguments, and its output."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from biofx.capture.graph_builder import Access, GraphBuilder, with_entries
from biofx.capture.symbolic_scalars import plain
from biofx.graph.guards import require_default, require_same, require_tensor

_CONSTANT = (bool, int, float, str, type(None))


class GraphSignature:
    """Adds the inputs and the output of one graph."""

    def __init__(self, builder: GraphBuilder) -> None:
        self._builder = builder
        self._containers: list[tuple[str, Any, Any]] = []

    def bind(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Add an input for each argument of a call of a module; return what to call its forward with.

        The inputs have the names of the arguments. What was left out, or is no tensor or number, is a
        constant, which the graph checks at each call.
        """
        builder = self._builder
        signature = inspect.signature(module.forward)
        given = signature.bind(*args, **kwargs).arguments
        taken: dict[str, Any] = {}
        optional = False
        for name, parameter in signature.parameters.items():
            optional = optional or parameter.default is not parameter.empty
            if parameter.kind is parameter.VAR_POSITIONAL:
                if given.get(name):
                    builder.stop("takes any number of arguments")
            elif parameter.kind is parameter.VAR_KEYWORD:
                taken |= {key: self._input(key, value, (None,)) for key, value in given.get(name, {}).items()}
            elif name in given:
                default = parameter.default if isinstance(parameter.default, _CONSTANT) else None
                taken[name] = self._input(name, given[name], (default,) if optional else ())
            elif isinstance(parameter.default, _CONSTANT):
                node = builder.node("placeholder", name, (parameter.default,))
                builder.node("call_function", require_default, (node, parameter.default, name))
        self._move_inputs_ahead()
        positional = [
            taken.pop(name)
            for name, parameter in signature.parameters.items()
            if parameter.kind is parameter.POSITIONAL_ONLY and name in taken
        ]
        return positional, taken

    def end(self, value: Any) -> None:
        """Add the output, and remove what nothing uses."""
        builder = self._builder
        for name, container, before in self._containers:
            if not _is_unchanged(container, before):
                builder.stop(f"changes argument {name}, which belongs to the caller")
        builder.contexts.check_end()
        builder.graph.output(self._output(value))
        for node in reversed(builder.graph.nodes):
            if node.meta.get("auxiliary") and not node.users:
                builder.graph.erase_node(node)

    def _input(self, name: str, value: Any, default: tuple[Any, ...]) -> Any:
        node = self._builder.node("placeholder", name, default)
        if isinstance(value, Tensor) and default:
            place = f"argument {name!r} was a tensor when recorded, and the graph"
            self._builder.node("call_function", require_tensor, (node, place))
        return self._argument(node, value, name)

    def _argument(self, node: Node, value: Any, name: str) -> Any:
        """Let a node give an argument, or an entry of one; return what the forward gets."""
        builder, value = self._builder, plain(value)
        if isinstance(value, Tensor) or type(value) in (int, float, torch.dtype, torch.device):
            return builder.take(node, value)
        if isinstance(value, (bool, str, type(None))):
            builder.node("call_function", require_default, (node, value, name))
            return value
        if not isinstance(value, (dict, tuple, list)):
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return builder.take(node, value)
            builder.stop(f"takes a {type(value).__name__} as {name}, which a graph cannot look into")

        def entry_of(access: Access, entry: Any) -> Any:
            return self._argument(
                builder.auxiliary(access[0], (node, access[1])), entry, f"{name}[{access[1]!r}]"
            )

        found = with_entries(value, entry_of)
        if isinstance(value, (tuple, list)):
            length = builder.node("call_function", len, (node,))
            builder.node(
                "call_function", require_same, (length, len(value), f"len({name})", builder.innermost)
            )
        if type(value) in (dict, tuple, list):
            self._containers.append((name, found, copy.copy(found)))
        return found

    def _output(self, value: Any) -> Any:
        """Return what a forward returns in the form that an output node can hold.

        Classes that code cannot write become calls of the class.
        """
        builder: GraphBuilder = self._builder
        kind: Any = type(value)
        if issubclass(kind, dict) and dataclasses.is_dataclass(kind):
            return builder.node(
                "call_function", kind, (), {key: self._output(each) for key, each in value.items()}
            )
        if kind is OrderedDict:
            entries = [(key, self._output(entry)) for key, entry in value.items()]
            return builder.node("call_function", OrderedDict, (entries,))
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return kind(*map(self._output, value))
        if kind in (tuple, list):
            return kind(map(self._output, value))
        if kind is dict:
            return {key: self._output(entry) for key, entry in value.items()}
        return builder.argument(value)

    def _move_inputs_ahead(self) -> None:
        nodes = self._builder.graph.nodes
        first = next((node for node in nodes if node.op != "placeholder"), None)
        for node in list(nodes):
            if first is not None and node.op == "placeholder":
                first.prepend(node)


def _is_unchanged(container: Any, before: Any) -> bool:
    """Whether a container holds the same objects as a copy made of it before."""
    if isinstance(container, dict):
        return list(container) == list(before) and all(map(operator.is_, container.values(), before.values()))
    return len(container) == len(before) and all(map(operator.is_, container, before))
