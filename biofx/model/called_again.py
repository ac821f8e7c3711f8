"""Layers that are called again, after an adapter was put around them since their call was lowered.

An adapter calls the layer inside of it, and a layer that ranks compute in parts (``parallelize_module``) has
hooks that share out its input and gather its output. So the operators on the layer's weight move to a graph
of the layer itself, and the model's graph calls the module at the layer's path.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.nn import functional as F

from biofx.graph.graph_functions import call_with_weights
from biofx.graph.joined_graph import whole_graph
from biofx.graph.printing import format_node
from biofx.graph.regions import ELSEWHERE
from biofx.layers import kind_of_call
from biofx.layers.layer_kind import LayerKind
from biofx.layers.single_weight import DENSE_KINDS, EMBEDDING
from biofx.layers.sites import innermost_path
from biofx.layers.weight_site import WEIGHT_OPERATORS
from biofx.model.graph_places import module_at
from biofx.model.inlined_modules import INLINED, InlinedModule, own_class
from biofx.operators.split_ops import fold_weight, sum_synapses
from biofx.plasticity.agreement import is_parallelized

STATE_OF_WEIGHT = "bio_mod"
"""The name of the submodule with the state of a layer's weight."""

_IN_PARTS = "_lines_before_parts"
Become = Callable[[nn.Module, Graph], GraphModule]
"""Turns a module into a graph module in its place."""


def call_again(graph_module: GraphModule, path: str, become: Become) -> bool:
    """Make a graph call the module at the path of a lowered layer; return whether that is possible.

    The operators on the weight move to the layer, which is searched in the module at its path. They must be
    the same at every call, the weight must not be folded, and the layer must not be recurrent, an attention
    or a normalisation.

    Args:
        graph_module: its graph computes the layer from visible weights; changed in place.
        path: of the layer.
        become: :func:`biofx.model.graph_module.become_graph_module`.
    """
    found = module_at(graph_module, path) if path else None  # a layer that has its own graph has no path
    calls = [n for n in graph_module.graph.nodes if innermost_path(n) == path and kind_of_call(n) is not None]
    kinds = [kind for call in calls if (kind := kind_of_call(call)) in (*DENSE_KINDS, EMBEDDING)]
    is_called = any(n.op == "call_module" and n.target == path for n in graph_module.graph.nodes)
    if (
        found is None
        or not calls
        or is_called
        or len(kinds) < len(calls)
        or any(kind.is_product for kind in kinds)
    ):
        return False
    inlined: InlinedModule = vars(graph_module)[INLINED][path]
    layer = _layer_in(found, kinds[0])
    own = [_LayerGraph(graph_module, call, path) for call in calls]
    if layer is None or inlined.difference(layer, is_root=True) is not None:
        return False
    adapted = bool({"forward", "weight"} & vars(found).keys()) or is_parallelized(found)
    if layer is found and not adapted:  # no adapter was put around it
        return False
    if any(graph.needs_more or str(graph.graph) != str(own[0].graph) for graph in own):
        return False
    if layer is found and "forward" in vars(layer):  # which may call the former one on the present weights
        for call in calls:
            _call_on_weights(call, path)
        graph_module.recompile()
        return True
    vars(layer)[ELSEWHERE] = own[0].others
    become(layer, own[0].graph)
    for call in calls:
        source = call.args[0]
        call.args, call.kwargs = (_before_padding(call),), {}
        call.op, call.target = "call_module", path
        if isinstance(source, Node) and not source.users and source is not call.args[0]:
            call.graph.erase_node(source)
    _erase_unused(graph_module.graph)
    graph_module.recompile()
    return True


def lines_as_transformed(graph_module: GraphModule) -> tuple[str, ...]:
    """Return the lines of a graph, without shapes of attributes, since those of factors may change.

    Those of a graph that calls layers because ranks compute them in parts are the lines from before.
    """
    lines = tuple(
        f"{node.name} = self.{node.target}" if node.op == "get_attr" else format_node(node)
        for node in whole_graph(graph_module).nodes
    )
    before: tuple[str, ...] = vars(graph_module).get(_IN_PARTS, {}).get(lines, lines)
    return before


def note_parts(graph_module: GraphModule, before: tuple[str, ...]) -> None:
    """Note what the lines of a graph were before it began to call layers that ranks compute in parts."""
    vars(graph_module).pop(_IN_PARTS, None)
    vars(graph_module)[_IN_PARTS] = {lines_as_transformed(graph_module): before}


def find_again(graph_module: GraphModule) -> bool:
    """Make a graph read the state of layers at their present paths; return whether one has changed.

    Adapters move a layer one level down, and back when they are removed.
    """
    moved = False
    for node in graph_module.graph.nodes:
        path = str(node.target)
        if node.op in ("get_attr", "call_module") and (now := _where_now(graph_module, path)) != path:
            node.target = now
            moved = True
    if moved:
        graph_module.recompile()
    return moved


def _where_now(graph_module: GraphModule, path: str) -> str:
    """Return the present path of a layer's state, after the layer was moved."""
    parts = path.split(".")
    place = parts.index(STATE_OF_WEIGHT) if STATE_OF_WEIGHT in parts else 0
    if not place or module_at(graph_module, ".".join(parts[: place + 1])) is not None:
        return path
    above = next(n for n in range(place, -1, -1) if module_at(graph_module, ".".join(parts[:n])) is not None)
    around: Any = module_at(graph_module, ".".join(parts[:above]))
    layers = [inner for inner, module in around.named_modules() if STATE_OF_WEIGHT in module._modules]
    if not above or len(layers) != 1:
        return path
    return ".".join((*parts[:above], *filter(None, layers), *parts[place:]))


def _layer_in(found: nn.Module, kind: LayerKind) -> nn.Module | None:
    """Return the layer around which an adapter was put: the only one of its kind with state for a weight."""
    inside = [
        module
        for module in found.modules()
        if STATE_OF_WEIGHT in module._modules and own_class(module) is kind.module_type
    ]
    return inside[0] if len(inside) == 1 else None


class _LayerGraph:
    """The graph of a layer's call, with paths in the layer, and the modules that it reads outside."""

    def __init__(self, graph_module: GraphModule, call: Node, path: str) -> None:
        self.graph = Graph(tracer_cls=Tracer)
        self.others = SimpleNamespace()
        self.needs_more = False
        """Whether it depends on other nodes of the model's graph, or folds the weight."""
        self._root = graph_module
        self._start = f"{path}."
        self._mapping: dict[Node, Node] = {_before_padding(call): self.graph.placeholder("input")}
        self.graph.output(self._copied(call))

    def _copied(self, node: Node) -> Node:
        if node not in self._mapping:
            folds = node.target in (fold_weight, sum_synapses)
            self.needs_more |= folds or node.op not in ("get_attr", "call_function", "call_method")
            if not self.needs_more:
                for source in node.all_input_nodes:
                    self._copied(source)
            made: Node = self.graph.node_copy(node, lambda source: self._mapping.get(source, source))
            made.meta = {}
            if node.op == "get_attr":
                made.target = self._local(str(node.target))
            self._mapping[node] = made
        found: Node = self._mapping[node]
        return found

    def _local(self, path: str) -> str:
        if path.startswith(self._start):
            return path[len(self._start) :]
        owner_path, _, name = _where_now(self._root, path).rpartition(".")
        owner = module_at(self._root, owner_path)
        held = vars(self.others)
        known = next((key for key, module in held.items() if module is owner), f"other_{len(held)}")
        held[known] = owner
        return f"{ELSEWHERE}.{known}.{name}"


def _call_on_weights(call: Node, path: str) -> None:
    """Make a node call the layer itself on the weights that the graph computes."""
    padded: Any = call.args[0]
    with call.graph.inserting_before(call):
        layer = call.graph.create_node("get_attr", path)
    weights = dict(zip(("weight", "bias"), call.args[1:], strict=False))
    call.args, call.kwargs = (layer, _before_padding(call), weights), {}
    call.target = call_with_weights
    if isinstance(padded, Node) and not padded.users:
        call.graph.erase_node(padded)


def _before_padding(call: Node) -> Node:
    """Return the input of a layer, before the padding that its module applies itself."""
    source: Any = call.args[0]
    if isinstance(source, Node) and source.target is F.pad and source.name.startswith(f"{call.name}_padded"):
        source = source.args[0]
    found: Node = source
    return found


def _erase_unused(graph: Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in WEIGHT_OPERATORS):
            graph.erase_node(node)
