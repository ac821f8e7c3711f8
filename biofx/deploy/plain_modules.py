"""Graph modules of biofx become graph modules of torch, or modules of their own class again, in place."""

from __future__ import annotations

import operator
from collections.abc import Set
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from biofx.capture.bytecode import names_mentioned
from biofx.errors import PassError
from biofx.graph.graph_functions import call_own_forward
from biofx.graph.guards import require_default, require_exported, require_same
from biofx.graph.regions import ELSEWHERE
from biofx.model.attribute_guards import GUARDS
from biofx.model.graph_module import NAMES_OF_MODELS, BioGraphModule, user_class
from biofx.model.inlined_modules import INLINED, SAME
from biofx.static_inspection import bases_outside_torch
from biofx.torch_private import assert_in_graph

_OF_GRAPH_MODULES = {
    *(set(vars(GraphModule(nn.Module(), Graph()))) - set(vars(nn.Module()))),
    *(*NAMES_OF_MODELS, GUARDS, ELSEWHERE, SAME, INLINED),
}
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
    "_is_full_backward_hook",
)
_LAYER = "layer"


def plain_graph_module(own: GraphModule, name: str) -> GraphModule:
    """Return a ``torch.fx.GraphModule`` of a graph and of what it uses, with the module's own hooks."""
    made = GraphModule(own, own.graph, name)
    for path, module in made.named_modules():
        source = own.get_submodule(path)
        if source is not module:  # buffers that were out of the state dict stay out of it
            module._non_persistent_buffers_set |= source._non_persistent_buffers_set & set(module._buffers)
    take_hooks(made, own)
    return made


def take_hooks(made: nn.Module, before: nn.Module) -> None:
    """Give a module the hooks of the module that it replaces."""
    vars(made).update({hooks: vars(before)[hooks] for hooks in _HOOKS if hooks in vars(before)})


def make_plain(module: BioGraphModule, mentioned: Set[str] = frozenset()) -> None:
    """Make a region, or a model that runs its eager forward, a module without biofx in place.

    Args:
        module: the region or model.
        mentioned: names that the eager forwards of the model mention, which are none of their own.

    Raises:
        PassError: one of them is that of a method of the region's class, which a plain graph module loses.
    """
    calls = module.graph.find_nodes(op="call_function", target=call_own_forward)
    if module.runs_eager_forward or (calls and _is_only_call(calls[0])):
        _take_over(module, _in_own_class(module))
        return
    lost = sorted(mentioned & _methods_of(module))
    if lost:
        raise PassError(
            f"a forward in Python may call {lost[0]!r} of a {type(module).__name__}, a method that a plain "
            "graph module does not have; name the module in opaque=[…] when the model is transformed"
        )
    for call in calls:  # the graph goes on after the layer
        module.add_module(_LAYER, _in_own_class(module))
        own = call.args[0]
        call.op, call.target, call.args, call.kwargs = "call_module", _LAYER, call.args[1], call.args[2]
        if not own.users:
            module.graph.erase_node(own)
    write_out_checks(module.graph)
    _take_over(module, plain_graph_module(module, type(module).__name__))


def names_of_others(kind: type[nn.Module]) -> set[str]:
    """Return the names that the forward of a class mentions, but for those of the class and of tensors."""
    return set(names_mentioned(kind)) - set(dir(kind)) - set(dir(Tensor))


def _methods_of(module: BioGraphModule) -> set[str]:
    kind = user_class(module)
    held = {} if kind is None else {n: v for base in bases_outside_torch(kind) for n, v in vars(base).items()}
    return {name for name, value in held.items() if isinstance(value, (FunctionType, property))} - {"forward"}


def _is_only_call(call: Node) -> bool:
    """Whether a graph does nothing but call a module's eager forward."""
    beside = [node for node in call.graph.nodes if node.op not in ("placeholder", "output")]
    return {node for node in beside if node.target is not require_default} == {call, call.args[0]}


def _in_own_class(module: BioGraphModule) -> nn.Module:
    """Return a module of the class that a graph module had, which holds the same."""
    made: nn.Module = object.__new__(user_class(module) or nn.Module)
    held = {name: value for name, value in vars(module).items() if name not in _OF_GRAPH_MODULES}
    called = {str(node.target).partition(".")[0] for node in module.graph.find_nodes(op="call_module")}
    held["_modules"] = {name: inner for name, inner in module._modules.items() if name not in called}
    vars(made).update(held)
    return made


def _take_over(module: nn.Module, other: nn.Module) -> None:
    module.__class__ = type(other)
    held = dict(vars(other))
    vars(module).clear()
    vars(module).update(held)


def write_out_checks(graph: Graph) -> None:
    """Check with operations of torch what a capture relied on: defaults of arguments, sizes that decide."""
    checks = [
        *graph.find_nodes(op="call_function", target=require_default),
        *graph.find_nodes(op="call_function", target=require_same),
    ]
    for node in checks:
        found, expected, name = node.args[:3]
        is_default = node.target is require_default
        described = f"argument {name!r}" if is_default else name
        verb = "captured" if is_default else "recorded"
        with graph.inserting_before(node):
            same: Any = graph.call_function(operator.eq, (found, expected))
            message = f"{described}: expected {expected!r}, with which the graph was {verb}"
            graph.call_function(assert_in_graph, (same, message))
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=require_exported):
        with graph.inserting_before(node):
            _write_out_exported(graph, *node.args)
        graph.erase_node(node)


def _write_out_exported(
    graph: Graph, found: Any, what: str, expected: Any, limits: tuple[tuple[int, int, int | None], ...] = ()
) -> None:
    """Check an input of an exported program."""

    def require(operation: Any, value: Any, other: Any, name: str, words: str = "") -> None:
        message = f"{name}: expected {words}{other}, for which the program was exported"
        graph.call_function(assert_in_graph, (graph.call_function(operation, (value, other)), message))

    if not isinstance(expected, tuple):
        require(operator.eq, found, expected, what)
        return
    for axis, size in enumerate(expected):
        if size is not None:
            require(operator.eq, graph.call_method("size", (found, axis)), size, f"{what}.shape[{axis}]")
    for axis, low, high in limits:
        size = graph.call_method("size", (found, axis))
        require(operator.ge, size, low, f"{what}.shape[{axis}]", "at least ")
        if high is not None:
            require(operator.le, size, high, f"{what}.shape[{axis}]", "at most ")
