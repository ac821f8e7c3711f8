"""A graph of dynamo becomes one of a model: its parameters are at their paths, its layers are called there.

Dynamo hands the parameters and buffers of a model over as inputs of its graph. Here they are read from
modules at the paths that they have in the model, and functions are calls of layers again where that is all
that a layer did. So passes, selectors and reports see what they see of the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from biofx.capture.exported_layers import Layers, flag_of
from biofx.capture.exported_programs import mode_of, tree_of
from biofx.compiling.compound_calls import show_weights_of_compounds
from biofx.compiling.dynamo_contexts import pair_contexts
from biofx.errors import CaptureError
from biofx.graph.regions import joined_path
from biofx.model.graph_module import BioGraphModule
from biofx.torch_private import HigherOrderOperator, rename

_STACK = "nn_module_stack"
_OPAQUE = frozenset({"autograd_function_apply", "flex_attention"})
"""Operators with graphs of their own in which no layer is called."""


@dataclass(frozen=True)
class FunctionCall:
    """The call of a function that became one of a layer."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: tuple[Any, ...]
    """What the layer was called with: nodes among the arguments of the function."""
    counted: str = ""
    """Path of the counter of batches that the layer increments by itself, empty where there is none."""


@dataclass(frozen=True)
class NamedGraph:
    """A graph of dynamo, with names."""

    module: BioGraphModule
    """The graph as one of layers and functions, on the parameters of the model."""
    inputs: Mapping[str, str | None]
    """Names of the inputs of dynamo's graph, in order; the path of each parameter and buffer among them."""
    functions: Mapping[str, FunctionCall] = field(default_factory=dict)
    """The functions that became calls of layers, by the names of their nodes."""


def paths_of(model: nn.Module) -> dict[int, str]:
    """Return the first path of each parameter and buffer of a model, by the tensor's id."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {id(tensor): path for path, tensor in reversed(tensors)}


def module_paths(model: nn.Module) -> dict[int, str]:
    """Return the first path of each module, by the module's id."""
    return {id(module): path for path, module in model.named_modules()}


def named_graph(
    source: GraphModule, model: nn.Module, values: Mapping[str, Any], paths: Mapping[int, str]
) -> NamedGraph:
    """Return a graph of dynamo as one of the model that it is of.

    Args:
        source: as dynamo hands it to a backend; not changed.
        model: holds the parameters.
        values: of the inputs of ``source``, by their names.
        paths: :func:`module_paths` of the model that was traced.

    Raises:
        CaptureError: it takes a parameter that is not one of the model's.
    """
    if any(True for _ in source.parameters()):
        raise CaptureError(
            "expected a graph that takes parameters as inputs, found one that holds them: set "
            "torch._dynamo.config.inline_inbuilt_nn_modules = True"
        )
    known = paths_of(model)
    graph = Graph()
    copied: dict[Node, Node] = {}
    graph.output(graph.graph_copy(source.graph, copied))
    for old, new in copied.items():
        new.meta = {"stack_trace": old.meta["stack_trace"]} if "stack_trace" in old.meta else {}
        new.meta[_STACK] = _named_stack(old, paths)
    inputs: dict[str, str | None] = {}
    for old in source.graph.find_nodes(op="placeholder"):
        value, new = values.get(old.name), copied[old]
        path = known.get(id(value)) if isinstance(value, Tensor) else None
        if path is None and isinstance(value, nn.Parameter):
            raise CaptureError(
                f"expected parameters of {type(model).__name__}, which is compiled, found another in the "
                f"graph, {old.target!r}; let the model hold it, or transform the model first and compile the "
                "result"
            )
        inputs[old.name] = path
        if path is not None:
            _read(graph, new, path)
    _refuse_bodies(graph, source, model)
    pair_contexts(graph)
    root = tree_of(model, graph, {})
    _keep_own(root, graph, source, model)
    _add_layers(root, model)
    show_weights_of_compounds(graph)
    training = mode_of(graph)
    functions = _with_layers(root, graph, training)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
        elif node.op == "get_attr":
            rename(node, str(node.target).replace(".", "_"))
    graph.lint()
    made = BioGraphModule.from_root(root, graph, type(model).__name__)
    vars(made).update(region_paths=(), graph_breaks={})
    return NamedGraph(made, inputs, functions)


def translated(paths: Mapping[int, str], named: Mapping[str, str]) -> dict[int, str]:
    """Return paths of modules for a part of a model that runs the code of another part, or model.

    Args:
        paths: :func:`module_paths` of the model that was traced.
        named: for the path of each parameter that was traced, that of the one in its place now.

    Raises:
        CaptureError: one module became several.
    """
    moved: dict[str, str] = {}
    for before, now in named.items():
        old, new = before.split("."), now.split(".")
        while old and new and old[-1] == new[-1]:
            old.pop()
            new.pop()
        if moved.setdefault(".".join(old), ".".join(new)) != ".".join(new):
            raise CaptureError(
                f"a graph that was compiled for {before!r} is called for {now!r} and for {moved}, so the "
                "paths of its modules are not known; compile each model with a backend of its own"
            )

    def path_now(path: str) -> str:
        for length in range(len(path.split(".")), -1, -1):
            old = ".".join(path.split(".")[:length])
            if old in moved:
                return joined_path(moved[old], path[len(old) :].lstrip("."))
        return path

    return {identity: path_now(path) for identity, path in paths.items()}


def _named_stack(node: Node, paths: Mapping[int, str]) -> dict[str, tuple[str, Any]]:
    """Return in which modules a node was called, by path, without the model itself."""
    found: dict[str, tuple[str, Any]] = {}
    for key, (_, kind) in (node.meta.get(_STACK) or {}).items():
        identity, _, call = str(key).partition("@")
        path = paths.get(int(identity)) if identity.isdigit() else None
        if path:
            found[f"{path}@{call}" if call else path] = (path, kind)
    return found


def _read(graph: Graph, node: Node, path: str) -> None:
    """Let an input that is a parameter or buffer be read from its path."""
    reads = graph.find_nodes(op="get_attr", target=path)
    if reads:  # a tensor that dynamo hands over twice
        node.replace_all_uses_with(reads[0])
        graph.erase_node(node)
        return
    node.op, node.target, node.args, node.kwargs, node.type = "get_attr", path, (), {}, None


def _refuse_bodies(graph: Graph, source: GraphModule, model: nn.Module) -> None:
    """Refuse weights that are used in graphs within the graph, into which passes do not look.

    Raises:
        CaptureError: there is one.
    """
    own = {name for name, _ in source.named_children()}
    weights = {path for path, parameter in model.named_parameters() if parameter.dim() > 1}
    for node in graph.nodes:
        if not isinstance(node.target, HigherOrderOperator) or node.target.name() in _OPAQUE:
            continue
        reads = {str(read.target) for read in node.all_input_nodes if read.op == "get_attr"}
        if reads & own and (inside := sorted(reads & weights)):
            raise CaptureError(
                f"expected weights that the graph itself uses, found {inside[0]!r} in a part that "
                f"{node.target.name()} runs (torch.utils.checkpoint, torch.cond, …); transform the model "
                "first and compile the result: torch.compile(biofx.transform(model, config).graph_module)"
            )


def _keep_own(root: nn.Module, graph: Graph, source: GraphModule, model: nn.Module) -> None:
    """Give modules what the graph itself holds: constants, and graphs of branches."""
    own = {name for name, _ in source.named_children()}
    for node in (*graph.find_nodes(op="get_attr"), *graph.find_nodes(op="call_module")):
        if str(node.target).partition(".")[0] in own and not hasattr(model, str(node.target)):
            setattr(root, str(node.target), source.get_submodule(str(node.target)))


def _add_layers(root: nn.Module, model: nn.Module) -> None:
    """Put a layer of torch wherever the model has one, for selectors by path and type; it shares tensors."""
    for path, module in model.named_modules(remove_duplicate=False):
        kind: Any = type(module)
        if not path or not kind.__module__.startswith("torch.nn.modules.") or module._modules:
            continue
        made = kind.__new__(kind)
        nn.Module.__init__(made)
        own = {name: value for name, value in vars(module).items() if name not in vars(made)}
        vars(made).update(own, _parameters=dict(module._parameters), _buffers=dict(module._buffers))
        made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        made.training = module.training
        owner, (*places, name) = root, path.split(".")
        for place in places:
            if place not in owner._modules:
                owner.add_module(place, nn.Module())
            owner = owner.get_submodule(place)
        owner._modules[name] = made


def _with_layers(root: nn.Module, graph: Graph, training: bool) -> dict[str, FunctionCall]:
    """Call layers where functions do what they did; return the functions, by the names of the new calls."""
    before = {
        node: (node.target, node.args, dict(node.kwargs), flag_of(node))
        for node in graph.nodes
        if node.op == "call_function"
    }
    counters = {str(user.args[0].target) for user in _counts(graph)}
    Layers(root, graph, training).raise_all()
    left = {str(user.args[0].target) for user in _counts(graph)}
    made = {}
    for node, (target, args, kwargs, _) in before.items():
        if node.op != "call_module":
            continue
        counter = joined_path(str(node.target), "num_batches_tracked")
        counted = counter if counter in counters - left else ""
        made[node.name] = FunctionCall(target, args, kwargs, node.args, counted)
    return made


def _counts(graph: Graph) -> list[Any]:
    """Return the nodes that increment a counter of batches."""
    found = graph.find_nodes(op="call_method", target="add_")
    return [node for node in found if isinstance(node.args[0], Node) and node.args[0].op == "get_attr"]
