"""The part of a graph that computes with parameters and buffers alone: its values, and the ways of weights.

Weights, signs and rates reach their layer as expressions in the graph. The value of such an expression can be
computed without an input, and without running the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from biofx.errors import InvariantError, PassError
from biofx.graph.graph_functions import call_with_parameters
from biofx.graph.joined_graph import whole_graph
from biofx.graph.node_kinds import changed_in_place, changes_in_place, queries_metadata
from biofx.graph.printing import format_node, function_name
from biofx.graph.regions import joined_path, region_paths
from biofx.layers.layer_kind import argument
from biofx.layers.weight_site import whole_weight
from biofx.operators.mask_ops import mask_weight
from biofx.operators.rate_ops import GRADIENT_SCALINGS
from biofx.operators.sign_ops import constrain_sign
from biofx.operators.split_ops import level_gradient, sum_sub_weights

_MISSING = object()


class ConstantPart:
    """The nodes of a graph whose values follow from parameters and buffers, and those values.

    Calls of modules are not among them (a module may have hooks and a state of its own), nor is what samples
    random numbers, nor what the graph changes in place somewhere.

    Args:
        graph_module: its nodes are read once, its tensors at each call of :meth:`value`.
        graph: the graph to look at, if not that of the model and its regions.
    """

    def __init__(self, graph_module: GraphModule, graph: Graph | None = None) -> None:
        self._graph_module = graph_module
        self.graph = whole_graph(graph_module) if graph is None else graph
        changed = {base for node in self.graph.nodes for base in changed_in_place(node)}
        self._nodes: set[Node] = set()
        self._roots: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            if node not in changed and self._is_constant(node):
                self._nodes.add(node)
                if (parameter := self.parameter(node)) is not None:
                    self._roots.setdefault(id(parameter), []).append(node)

    def __contains__(self, node: Node) -> bool:
        return node in self._nodes

    def parameter(self, node: Node) -> nn.Parameter | None:
        """Return the parameter that a node reads, None if it reads something else."""
        found = self._held(str(node.target)) if node.op == "get_attr" else None
        return found if isinstance(found, nn.Parameter) else None

    def roots(self, parameter: nn.Parameter) -> list[Node]:
        """Return the nodes that read a parameter."""
        return self._roots.get(id(parameter), [])

    def value(self, node: Node, given: Mapping[Node, Any] | None = None) -> Any:
        """Return what a node computes at this moment; no gradient flows to it.

        Args:
            node: one of the constant nodes.
            given: values of some nodes, instead of what they compute.

        Raises:
            InvariantError: it is not one of the constant nodes, or computing it fails.
        """
        values: dict[Node, Any] = dict(given or {})
        pending = [node]
        with torch.no_grad():
            while pending:
                current = pending[-1]
                missing = [source for source in current.all_input_nodes if source not in values]
                if current in values:
                    pending.pop()
                elif current not in self._nodes:
                    raise InvariantError(
                        f"expected {current.name!r} to follow from parameters and buffers alone, found "
                        f"{format_node(current)!r}, which needs the model's input or changes at every call"
                    )
                elif missing:
                    pending += missing
                else:
                    values[pending.pop()] = self._computed(current, values)
        return values[node]

    def _computed(self, node: Node, values: Mapping[Node, Any]) -> Any:
        if node.op == "get_attr":
            return self._held(str(node.target))
        args = map_arg(node.args, lambda source: values[source])
        kwargs = map_arg(node.kwargs, lambda source: values[source])
        try:
            if node.op == "call_method":
                receiver, *rest = args
                return getattr(receiver, str(node.target))(*rest, **kwargs)
            function: Any = node.target
            return function(*args, **kwargs)
        except Exception as error:
            raise InvariantError(f"computing {format_node(node)!r} fails: {error}") from error

    def _is_constant(self, node: Node) -> bool:
        if node.op == "get_attr":
            return self._held(str(node.target)) is not _MISSING
        return (
            node.op in ("call_function", "call_method")
            and all(source in self._nodes for source in node.all_input_nodes)
            and not (node.is_impure() or changes_in_place(node) or _is_random(node))
        )

    def _held(self, path: str) -> Any:
        """Return what is held under a path; a weight that a parametrization computes is not held."""
        owner_path, _, name = path.rpartition(".")
        try:
            owner = self._graph_module.get_submodule(owner_path)
        except AttributeError:
            return _MISSING
        for table in (owner._parameters, owner._buffers, vars(owner)):
            if name in table:
                return table[name]
        return _MISSING


def _is_random(node: Node) -> bool:
    name = function_name(node.target)
    return "dropout" in name or name.rstrip("_") in _RANDOM_NAMES or name.startswith("rand")


_RANDOM_NAMES = frozenset(
    {
        *("bernoulli", "binomial", "cauchy", "exponential", "geometric", "gumbel_softmax", "log_normal"),
        *("multinomial", "normal", "poisson", "rrelu", "uniform"),
    }
)


# the ways of weights

_OPERATORS: frozenset[Any] = GRADIENT_SCALINGS | {mask_weight, constrain_sign, level_gradient}
_MOVES = frozenset(
    {
        *("chunk", "contiguous", "detach", "expand", "flatten", "getattr", "getitem", "index_select"),
        *("movedim", "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes", "t"),
        *("tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
    }
)


class Treatment(IntEnum):
    """What the graph does to a weight besides masking, constraining and scaling it."""

    NOTHING = 0
    MOVED = 1
    """Its entries are sliced, transposed or reshaped."""
    COMPUTED = 2
    """New entries are computed from them."""


@dataclass(frozen=True)
class WeightUse:
    """One way that a parameter takes to something that works on the model's data."""

    parameter: nn.Parameter
    path: str
    """Path by which the graph reads the parameter."""
    expression: Node
    """The last node that follows from parameters and buffers alone."""
    whole: Node
    """The last node on the way at which the weight is still laid out as the parameter is."""
    reader: Node | None
    """The node that works on data."""
    constraints: tuple[Node, ...] = ()
    """Sign constraints on the way, innermost first."""
    scalings: tuple[Node, ...] = ()
    """Gradient scalings on the way, innermost first."""
    masks: tuple[Node, ...] = ()
    """Masks on the way, innermost first."""
    before: Treatment = Treatment.NOTHING
    """What happens to the parameter up to the first constraint; all of it where there is none."""
    after: Treatment = Treatment.NOTHING
    """What happens to it from there on."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from other ways to the same place."""
        found = (self.constraints, self.scalings, self.masks)
        return (id(self.parameter), self.whole, *found, self.before, self.after)


def weight_uses(constants: ConstantPart) -> list[WeightUse]:
    """Return every way from a parameter to something that works on data, in the graph's order."""
    ways: dict[Node, dict[tuple[Any, ...], WeightUse]] = {}
    uses: list[WeightUse] = []
    for node in constants.graph.nodes:
        if node not in constants:
            continue
        arriving = _arriving(node, constants, ways)
        if arriving:
            ways[node] = {way.key: way for way in arriving}
            readers = [user for user in node.users if user not in constants]
            uses += [replace(way, reader=user) for way in ways[node].values() for user in readers]
    return uses


def moved_alike(constants: ConstantPart, start: Node, end: Node, value: Tensor) -> Any:
    """Return what becomes of a value if it is moved as the graph moves a weight, and not computed with.

    Args:
        constants: the constant part of the graph.
        start: the node whose value is replaced.
        end: a node that follows from it.
        value: of the shape of the weight.

    Raises:
        InvariantError: something on the way cannot be computed.
    """
    found: dict[Node, Any] = {start: value}
    for node in constants.graph.nodes:
        before = next((source for source in node.all_input_nodes if source in found), None)
        if node is start or before is None or node not in constants:
            continue
        moves = function_name(node.target) in _MOVES and not queries_metadata(node)
        found[node] = constants.value(node, found) if moves else found[before]
        if node is end:
            break
    return found.get(end, value)


def _arriving(
    node: Node, constants: ConstantPart, ways: Mapping[Node, Mapping[tuple[Any, ...], WeightUse]]
) -> list[WeightUse]:
    """Return the ways that lead to a node, those that end in its signs or rates left out."""
    if (parameter := constants.parameter(node)) is not None:
        return [WeightUse(parameter, str(node.target), node, node, None)]
    if node.target in _OPERATORS:
        weight = argument(node, 0, "weight")
        return [_through(way, node) for way in ways.get(weight, {}).values()]
    if node.target is sum_sub_weights:  # laid out as each of them is
        sources = [way for source in node.all_input_nodes for way in ways.get(source, {}).values()]
        return [_through(way, node) for way in sources]
    if queries_metadata(node):
        return []
    moves = function_name(node.target) in _MOVES
    kind = Treatment.MOVED if moves else Treatment.COMPUTED
    found = []
    for source in node.all_input_nodes:
        for way in ways.get(source, {}).values():
            side = "after" if way.constraints else "before"
            found.append(replace(way, expression=node, **{side: max(kind, getattr(way, side))}))
    return found


def _through(way: WeightUse, node: Node) -> WeightUse:
    """Return a way extended by an operator that leaves the weight laid out as it is."""
    untouched = way.before == way.after == Treatment.NOTHING
    whole = node if untouched else way.whole
    if node.target is constrain_sign:
        return replace(way, expression=node, whole=whole, constraints=(*way.constraints, node))
    if node.target is mask_weight:
        return replace(way, expression=node, whole=whole, masks=(*way.masks, node))
    if node.target not in GRADIENT_SCALINGS:
        return replace(way, expression=node, whole=whole)
    return replace(way, expression=node, whole=whole, scalings=(*way.scalings, node))


# weights replaced by their values


@torch.no_grad()
def evaluate_weights(own: GraphModule) -> None:
    """Replace what biofx computes from parameters and buffers alone by its value, a parameter."""
    constants = ConstantPart(own)
    values: dict[Node, Any] = {}
    for node in own.graph.nodes:
        if node.op == "get_attr" or node not in constants:
            continue
        if is_of_biofx(node.target) or any(source in values for source in node.all_input_nodes):
            values[node] = constants.value(node, values)
    unread = {node for node in own.graph.nodes if not node.users}
    made: dict[str, list[tuple[Tensor, str]]] = {}
    for node in list(own.graph.nodes):
        if node in values and any(user not in values for user in node.users):
            path = _root_path(node, constants)
            owner, _, name = path.rpartition(".")
            trained = getattr(own.get_submodule(owner), name).requires_grad
            known = made.setdefault(path, [])
            same = next((held for value, held in known if torch.equal(value, values[node])), None)
            if same is None:
                same = register_beside(own, nn.Parameter(values[node].clone(), requires_grad=trained), path)
                known.append((values[node], same))
            _replace(node, same)
    for node in reversed(own.graph.nodes):
        if not node.users and node in constants and node not in unread:
            own.graph.erase_node(node)
    erase_unused_reads(own)
    _keep_names(own, {path: known[0][1] for path, known in made.items() if len(known) == 1})
    _put_in_place(own)


def _keep_names(own: GraphModule, made: Mapping[str, str]) -> None:
    """Give values the names of the parameters that they replace, where nothing else needs those.

    Eager forwards may ask for the type of a parameter, by its name.

    Args:
        own: the model.
        made: the paths of the values, by the paths of the parameters.
    """
    reads = {str(node.target) for node in own.graph.find_nodes(op="get_attr")}
    called = {str(node.target) for node in own.graph.find_nodes(op="call_module")} - {*region_paths(own)}
    for path, value in made.items():
        owner = own.get_submodule(path.rpartition(".")[0])
        held, name = owner._parameters, path.rpartition(".")[2]
        new, old = held.get(value.rpartition(".")[2]), held.get(name)
        is_free = path not in reads and not any(path.startswith(f"{module}.") for module in called)
        if is_free and new is not None and old is not None and old.shape == new.shape:
            held[name] = held.pop(value.rpartition(".")[2])
            for read in own.graph.find_nodes(op="get_attr"):
                if read.target == value:
                    read.target = path


def _put_in_place(own: GraphModule) -> None:
    """Give eager forwards the values of expressions under the names of the parameters that they replace.

    Raises:
        PassError: something else still reads the parameter as it was.
    """
    reads = {str(node.target) for node in own.graph.find_nodes(op="get_attr")}
    for call in own.graph.find_nodes(op="call_function", target=call_with_parameters):
        around = call.args[0] if isinstance(call.args[0], str) else ""
        given: Any = call.args[3]
        for name, source in given.items():
            path = joined_path(around, name)
            if source.target == path:
                continue
            if path in reads:
                raise PassError(
                    f"{path!r} is used as it is and, in a forward that stays in Python, as what is computed "
                    "from it; a plain model has one value for both"
                )
            owner = own.get_submodule(path.rpartition(".")[0])
            value = owner._parameters.pop(str(source.target).rpartition(".")[2])
            owner._parameters[path.rpartition(".")[2]] = value
            source.target = path


def erase_unused_reads(own: GraphModule) -> None:
    """Erase reads of attributes that nothing uses; other nodes without a user may be there for an effect."""
    for node in own.graph.find_nodes(op="get_attr"):
        if not node.users:
            own.graph.erase_node(node)


def _root_path(node: Node, constants: ConstantPart) -> str:
    """Return the path of the parameter that a weight expression starts from."""
    while node.op != "get_attr":
        node = weight_operand(node, constants)
    return str(node.target)


def weight_operand(node: Node, constants: ConstantPart) -> Node:
    """Return the input of a node that has a weight's entries: the largest parameter's, or the first input."""
    sizes = {source: _largest_parameter(source, constants) for source in node.all_input_nodes}
    return max(sizes, key=lambda source: sizes[source])


def _largest_parameter(node: Node, constants: ConstantPart) -> int:
    """Return how many entries the largest parameter has that a node follows from, a count."""
    largest = -1
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        parameter = constants.parameter(current)
        if parameter is not None:
            largest = max(largest, parameter.numel())
        new = [source for source in current.all_input_nodes if source not in seen]
        seen.update(new)
        pending += new
    return largest


def register_beside(own: GraphModule, value: nn.Parameter, path: str) -> str:
    """Register a parameter next to the one at a path, or that this is a sub-weight of; return its path."""
    path = whole_weight(path)
    owner_path, _, name = path.rpartition(".")
    owner = own.get_submodule(owner_path)
    number = 1
    while hasattr(owner, f"{name}_{number}"):
        number += 1
    owner.register_parameter(f"{name}_{number}", value)
    return f"{path}_{number}"


def _replace(node: Node, path: str) -> None:
    """Replace a node by a read of a parameter."""
    with node.graph.inserting_before(node):
        read = node.graph.create_node("get_attr", path, name=f"{node.name}_value")
    read.meta = dict(node.meta)
    node.replace_all_uses_with(read)


def is_of_biofx(thing: Any) -> bool:
    """Whether a function or a class is one of biofx's own."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] == "biofx"
