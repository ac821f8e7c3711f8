"""Functions that captured graphs call in the place of what Python does in a forward.

They call a module without showing what it computes (its eager forward, a checkpointed call, an autograd
function), assign to a buffer, or query a dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.node import has_side_effect
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from biofx.errors import CaptureError
from biofx.graph.guards import RecordingError
from biofx.torch_private import pytree

_ABSENT = object()
EAGER_FORWARD = "own_forward"
"""Attribute of a graph module that is the forward of its class."""
OWN_MODULE = "own_module"
"""Attribute of a graph module that is the module itself."""


def call_own_forward(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a module's eager forward from its graph."""
    return forward(*args, **kwargs)


def call_with_parameters(
    forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> Any:
    """Run a module's eager forward with expressions in the place of its parameters.

    Args:
        forward: the forward, bound to the module by ``functools.partial``; in a joined graph, the path of
            the module.
        args: positional arguments.
        kwargs: keyword arguments.
        parameters: the expressions, by the path of the parameter in the module.
    """
    return _call_with_tensors(forward.args[0], parameters, forward, args, kwargs)


def call_with_weights(layer: nn.Module, given: Any, weights: Mapping[str, Tensor]) -> Any:
    """Call a layer with expressions in the place of its weights, whatever its forward is at the time.

    Args:
        layer: a module with weights of these names.
        given: its input.
        weights: the expressions, by name of the weight.
    """
    return _call_with_tensors(layer, weights, layer, (given,), {})


def _call_with_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a function while plain attributes of modules hide their parameters, which stay where they are."""
    owners = {name: vars(module.get_submodule(name.rpartition(".")[0])) for name in tensors}
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, tensor in tensors.items():
            held, name = owners[path], path.rpartition(".")[2]
            before.append((held, name, held.get(name, _ABSENT)))
            held[name] = tensor
        return function(*args, **kwargs)
    finally:
        for held, name, value in reversed(before):
            held.pop(name, None)
            if value is not _ABSENT:
                held[name] = value


def eager_forward_graph() -> Graph:
    """Return a graph that runs the forward of the module's class on any arguments."""
    graph, given = _graph_of_any_arguments()
    graph.output(graph.call_function(call_own_forward, given))
    return graph


def parameters_graph(module: nn.Module, names: Iterable[str]) -> Graph:
    """Return a graph that runs the forward of a module's class and reads the parameters at these paths."""
    graph, given = _graph_of_any_arguments()
    reads = {}
    for name in names:
        reads[name] = graph.create_node("get_attr", name)
        if owner := name.rpartition(".")[0]:
            reads[name].meta["nn_module_stack"] = {owner: (owner, type(module.get_submodule(owner)))}
    graph.output(graph.call_function(call_with_parameters, (*given, reads)))
    return graph


def _graph_of_any_arguments() -> tuple[Graph, tuple[Node, Node, Node]]:
    graph = Graph(tracer_cls=Tracer)
    args = graph.create_node("placeholder", "*args")
    kwargs = graph.create_node("placeholder", "**kwargs")
    return graph, (graph.create_node("get_attr", EAGER_FORWARD), args, kwargs)


def call_checkpointed(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """Call a module under ``torch.utils.checkpoint``; the module has a graph of its own.

    Args:
        module: a submodule of the module that the graph belongs to.
        args: its positional arguments.
        kwargs: its keyword arguments.
        options: those of ``torch.utils.checkpoint.checkpoint``.

    Raises:
        CaptureError: the graph is being traced again, which would lose the checkpointing.
    """
    _refuse_proxies(pytree.tree_leaves((args, dict(kwargs))), "calls a module under torch.utils.checkpoint")
    return checkpoint(module, *args, **options, **kwargs)


def checkpointed_path(node: Node) -> str | None:
    """Return the path of the module that a node calls under checkpointing, None if it calls none."""
    if node.target is not call_checkpointed:
        return None
    module: Any = node.args[0]
    return str(module.target)


def has_checkpoints(graph: Graph) -> bool:
    """Whether a graph calls modules under checkpointing."""
    return bool(graph.find_nodes(op="call_function", target=call_checkpointed))


@dataclass(frozen=True)
class AppliedFunction:
    """Applies a ``torch.autograd.Function``; its forward and backward are not part of the graph.

    Tracing the graph again records the call and does not look inside. It is pickled as the name of the
    function's class, which must be importable where it is loaded.
    """

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the function."""
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Proxy):
                return leaf.tracer.create_proxy("call_function", self, args, kwargs)
        apply: Any = self.function.apply
        return apply(*args, **kwargs)


@has_side_effect
def assign_buffer(owner: nn.Module, name: str, value: Any, path: str) -> None:
    """Assign a tensor of the same shape and dtype to a buffer of a module.

    Args:
        owner: the module.
        name: name of the buffer in it.
        value: the tensor.
        path: path of ``owner`` in the whole model.

    Raises:
        RecordingError: it has another shape or dtype, on which the graph may depend.
        CaptureError: the graph is being traced again, which would lose the assignment.
    """
    _refuse_proxies([value], f"assigns to a buffer ({name!r})")
    before = owner._buffers[name]
    if before is None or (before.shape, before.dtype) != (value.shape, value.dtype):
        was = "None" if before is None else f"{tuple(before.shape)} of {before.dtype}"
        raise RecordingError(
            f"module {path!r} assigns to its buffer {name!r}: expected {was} as before, found "
            f"{tuple(value.shape)} of {value.dtype}; name the module in opaque=[{path!r}]",
            path,
        )
    setattr(owner, name, value)


def _refuse_proxies(leaves: list[Any], what: str) -> None:
    if any(isinstance(leaf, Proxy) for leaf in leaves):
        raise CaptureError(
            f"a graph that {what} cannot be traced again; copy it (copy.deepcopy, pickle) or transform it "
            "as it is"
        )


def limit_of(dtype: Any, name: str) -> Any:
    """Return a number of ``torch.finfo`` of a dtype, or of ``torch.iinfo`` where it is an integer dtype.

    Args:
        dtype: the dtype.
        name: name of the number: ``min``, ``max``, ``eps``, ``tiny``, ….
    """
    if has_torch_function((dtype,)):
        return handle_torch_function(limit_of, (dtype,), dtype, name)
    limits: Any = torch.finfo if dtype.is_floating_point or dtype.is_complex else torch.iinfo
    return getattr(limits(dtype), name)


def type_from(dtype: Any, name: str) -> Any:
    """Return the real or complex dtype (``to_real``, ``to_complex``) that belongs to a dtype."""
    if has_torch_function((dtype,)):
        return handle_torch_function(type_from, (dtype,), dtype, name)
    return getattr(dtype, name)()
