"""Weight sites: the places in a graph where a layer's weight meets its input.

A site is either a call of a layer module (``call_module fc``) or, once lowered, a call of the layer's
function on a visible weight expression (``linear(x, scale_gradient(fc.weight, …), fc.bias)``). Code that a
user wrote in the second form is a site like any other. A recurrent layer or an attention has several
weights, and so several sites at one node, each with a role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from biofx import ops
from biofx.graph.region_use import RegionUse
from biofx.graph.regions import kept_around, kept_modules, whole_graph
from biofx.layers.layer_kinds import LayerKind, compound_kind_of, kind_of, kind_of_call, unitless_kind_of
from biofx.layers.obstacles import computed, obstacle_to_lowering
from biofx.layers.other_reads import READ, ReadSlot, multiplies, obstacle_to_reads, slot_of_reads
from biofx.layers.unitless_layers import obstacle_to_lookup
from biofx.layers.weight_slots import ONE_WEIGHT, WeightSlot, argument, slots_of_call, slots_of_module
from biofx.operators.fold_ops import fold_weight
from biofx.operators.rate_ops import GRADIENT_SCALINGS

WEIGHT_OPERATORS: frozenset[Callable[..., Any]] = GRADIENT_SCALINGS | {ops.constrain_sign, fold_weight}
"""What may stand between a parameter and the layer that uses it."""


@dataclass(frozen=True)
class WeightSite:
    """One use of one weight."""

    node: Node
    """The node that computes the layer's output."""
    kind: LayerKind
    parameter_path: str
    """Path of the weight; of a tied weight, the first path it goes by."""
    parameter: nn.Parameter = field(repr=False)
    groups: int
    obstacle: str | None
    """Why nothing may be done with the weight's values, or None."""
    slot: WeightSlot = ONE_WEIGHT[0]
    """Which of the layer's weights it is."""
    barrier: str | None = None
    """Why the weight cannot even be made visible, so that its gradient could be scaled, or None."""

    @property
    def role(self) -> str:
        """What the weight's presynaptic units are, ``"input"`` where it reads the layer's input."""
        return self.slot.role

    @property
    def layer(self) -> str:
        """Path of the module that owns the weight, empty for the model itself."""
        return self.parameter_path.rpartition(".")[0]

    @property
    def weight_node(self) -> Node | None:
        """The weight expression the site reads, None while the layer module still hides it."""
        if self.node.op == "call_module" and self.kind is not READ:
            return None
        weight = self.slot.read(self.node)
        return weight if isinstance(weight, Node) else None

    @property
    def operators(self) -> list[Node]:
        """The operators on the way from the parameter to the site, innermost first."""
        found = []
        node = self.weight_node
        while node is not None and node.target in WEIGHT_OPERATORS:
            found.append(node)
            node = node.args[0] if isinstance(node.args[0], Node) else None
        return found[::-1]

    @property
    def output_channels(self) -> int:
        """Channels of the output (its postsynaptic units), a count; gates do not count."""
        shape = self.parameter.shape
        return shape[1] * self.groups if self.kind.transposed else shape[0] // self.slot.blocks

    @property
    def input_channels(self) -> int:
        """Channels of the layer's input (its presynaptic units), a count."""
        shape = self.parameter.shape
        return shape[0] if self.kind.transposed else shape[1] * self.groups

    @property
    def why_no_channels(self) -> str | None:
        """Why the node's output is not one tensor with a channel for each unit, None if it is."""
        if self.kind.why_no_units:
            return self.kind.why_no_units
        return f"{self.kind.name} returns more than this weight's output" if self.kind.is_compound else None

    def has(self, operator: Callable[..., Any]) -> bool:
        """Whether the weight already passes through ``operator`` on its way here."""
        return any(node.target is operator for node in self.operators)

    @property
    def is_scaled(self) -> bool:
        """Whether the weight's gradient is scaled on the way back from here, by factors kept or drawn."""
        return any(node.target in GRADIENT_SCALINGS for node in self.operators)

    def told(self, message: str) -> str:
        """Return words about the weight; they begin with its name where the layer has several."""
        return f"{self.slot.name}: {message}" if self.kind.is_compound or self.kind is READ else message


@dataclass(frozen=True)
class Bystander:
    """A layer that a pass would like to rewrite and cannot reach."""

    layer: str
    node: Node | None
    reason: str


@dataclass(frozen=True)
class Sites:
    """Everything in a model that has, or should have, a weight site."""

    found: list[WeightSite]
    """In execution order."""
    bystanders: list[Bystander]
    reads: list[WeightSite] = field(default_factory=list)
    """What else reads parameters, of kind ``READ``; in execution order."""

    def weights(self) -> list[Weight]:
        """Return the weights, in order of their first use, each with all its sites."""
        uses = _by_parameter(self.found)
        last = max(1, len(uses) - 1)
        return [Weight(tuple(sites), place / last) for place, sites in enumerate(uses.values())]

    def weights_and_reads(self, *, directly: bool) -> list[Weight]:
        """Return the weights with whatever else reads them, and those that no site has but a product.

        Args:
            directly: whether to return all other parameters too that a graph reads.
        """
        reads = _by_parameter(self.reads)
        weights = [
            Weight((*weight.sites, *reads.pop(id(weight.parameter), ())), weight.depth)
            for weight in self.weights()
        ]
        for sites in reads.values():
            first = sites[0]
            if directly or any(
                isinstance(site.slot, ReadSlot) and multiplies(site.slot, first.parameter) for site in sites
            ):
                before = [weight.depth for weight in weights if weight.sites[0].node < first.node]
                weights.append(Weight(tuple(sites), max(before, default=0.0)))
        return weights


@dataclass(frozen=True)
class Weight:
    """A weight and some or all of its uses."""

    sites: tuple[WeightSite, ...]
    depth: float
    """Place in execution order, 0 for the first weight of the model and 1 for the last."""

    @property
    def path(self) -> str:
        """Path of the parameter."""
        return self.sites[0].parameter_path

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        return self.sites[0].parameter


def _by_parameter(sites: list[WeightSite]) -> dict[int, list[WeightSite]]:
    uses: dict[int, list[WeightSite]] = {}
    for site in sites:
        uses.setdefault(id(site.parameter), []).append(site)
    return uses


def find_sites(graph_module: GraphModule) -> Sites:
    """Return every weight site of a graph, and every layer that has none with the reason."""
    found: list[WeightSite] = []
    bystanders: list[Bystander] = []
    hidden: list[Bystander] = []
    survey = _Survey(graph_module)
    for node in survey.graph.nodes:
        if survey.use.is_call_of_a_region(node):
            continue
        if node.op == "call_module" and survey.is_opaque(node):
            hidden += survey.layers_inside(node)
        for entry in survey.sites_at(node):
            if isinstance(entry, WeightSite):
                found.append(entry)
            else:
                bystanders.append(entry)
    visible = {site.layer for site in found}
    bystanders += [entry for entry in hidden if entry.layer not in visible]
    seen = visible | {bystander.layer for bystander in bystanders}
    seen |= {str(node.target) for node in survey.graph.nodes if node.op == "call_module"}
    seen |= {innermost_path(site.node) for site in found}  # of a tied weight, the layer that is called
    bystanders += [
        Bystander(path, None, _why_not_seen(path, kept_modules(graph_module)))
        for path in _layers_of(graph_module)
        if path not in seen and not survey.is_used(path)
    ]
    return Sites(found, bystanders, survey.reads())


def _why_not_seen(path: str, kept: Mapping[str, str]) -> str:
    around = kept_around(path, kept)
    if around is None:
        return "never called in the forward"
    owner = f"module {around!r}" if around else "the model"
    return f"only Python calls it, if anything does: the forward of {owner} runs in Python"


def parameter_behind(node: Any) -> Node | None:
    """Return the ``get_attr`` node at the root of a weight expression, None if it is something else."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in WEIGHT_OPERATORS:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "get_attr" else None


def _layers_of(root: nn.Module) -> Iterator[str]:
    """Yield the paths of all layers, each module once; the output projection is part of its attention."""
    parts: set[int] = set()
    for path, module in root.named_modules():
        if compound_kind_of(module) is not None:
            yield path
            parts.update(map(id, module.children()))
        elif _kind_of_module(module) is not None and id(module) not in parts:
            yield path


def _kind_of_module(module: nn.Module) -> LayerKind | None:
    return kind_of(module) or compound_kind_of(module) or unitless_kind_of(module)


def fold_behind(weight: Any) -> Node | None:
    """Return the node that folds a weight that a layer reads, None where it is not folded."""
    return weight if isinstance(weight, Node) and weight.target is fold_weight else None


def _computed_weight(module: Any, kind: LayerKind) -> nn.Parameter:
    """Return something of a weight's shape; to compute the weight itself would be a step of spectral norm."""
    if kind.why_no_units:
        shape = _shape_without_units(module)
    elif kind.kernel_axes == 0:
        shape = (module.out_features, module.in_features)
    else:
        ends = (module.out_channels, module.in_channels)
        first, second = ends[::-1] if kind.transposed else ends
        shape = (first, second // module.groups, *module.kernel_size)
    return nn.Parameter(torch.zeros(()).expand(shape))


def _shape_without_units(module: Any) -> tuple[int, ...]:
    if isinstance(module, nn.Bilinear):
        return (module.out_features, module.in1_features, module.in2_features)
    return (module.num_embeddings, module.embedding_dim)


class _Survey:
    """One walk over a graph, with the tables it needs built once."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph = whole_graph(graph_module)
        self.use = RegionUse(graph_module, self.graph)
        self._modules = dict(graph_module.named_modules(remove_duplicate=False))
        first_path: dict[int, str] = {}
        self._parameters: dict[str, tuple[str, nn.Parameter]] = {}
        for path, parameter in graph_module.named_parameters(remove_duplicate=False):
            first_path.setdefault(id(parameter), path)
            self._parameters[path] = (first_path[id(parameter)], parameter)
        self._outside = self._uses_outside_sites()

    def sites_at(self, node: Node) -> Iterator[WeightSite | Bystander]:
        """Yield the site of each weight that a node reads as a layer."""
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            kind = _kind_of_module(module)
            if kind is not None:
                yield from self._module_sites(node, module, kind)
        elif (kind := self._kind_of_call(node)) is not None:
            for slot in slots_of_call(node, kind):
                yield self._function_site(node, kind, slot)

    def _module_sites(
        self, node: Node, module: nn.Module, kind: LayerKind
    ) -> Iterator[WeightSite | Bystander]:
        slots = slots_of_module(module, kind)
        obstacle = obstacle_to_lowering(node, module, kind, slots)
        if kind.why_no_units:
            obstacle = obstacle or obstacle_to_lookup(node, module, kind)
        groups: Any = getattr(module, "groups", 1)
        for slot in slots:
            path = f"{node.target}.{slot.name}"
            named = self._parameters.get(path)
            if named is None and kind.is_compound:
                yield Bystander(path.rpartition(".")[0], node, f"{slot.name}: {computed(slot.name)}")
                continue
            if named is None:
                named = (path, _computed_weight(module, kind))
            else:
                named = (self.use.path_for(node, path, named[0]), named[1])
            barrier = obstacle or self._barrier(node, named[1])
            against = barrier or self._outside.get(id(named[1]))
            yield WeightSite(node, kind, *named, groups, against, slot, barrier)

    def _function_site(self, node: Node, kind: LayerKind, slot: WeightSlot) -> WeightSite | Bystander:
        weight = slot.read(node)
        root = parameter_behind(weight)
        named = self._parameters.get(str(root.target)) if root is not None else None
        if root is None or named is None:
            reason = f"its weight is {weight}, computed in the graph, not a parameter"
            return Bystander(innermost_path(node), node, reason)
        named = (self.use.path_for(node, str(root.target), named[0]), named[1])
        barrier = self._barrier(node, named[1])
        if kind.why_no_units:
            barrier = barrier or obstacle_to_lookup(node, None, kind)
        folded = fold_behind(weight)
        if folded is not None:
            barrier = f"its weight is folded already ({folded.name}); what acts on weights goes before folds"
        obstacle = barrier or self._outside.get(id(named[1]))
        return WeightSite(node, kind, *named, _groups_of(node, kind), obstacle, slot, barrier)

    def _kind_of_call(self, node: Node) -> LayerKind | None:
        """Return the kind of a call; a product is a layer where a matrix of parameters is its factor."""
        kind = kind_of_call(node)
        if kind is None or not kind.is_product:
            return kind
        root = parameter_behind(slots_of_call(node, kind)[0].read(node))
        named = None if root is None else self._parameters.get(str(root.target))
        bias = argument(node, 0, "input") if kind.source[0] > 0 else None
        added_to_data = isinstance(bias, Node) and parameter_behind(bias) is None
        return None if named is None or named[1].dim() != 2 or added_to_data else kind

    def is_opaque(self, node: Node) -> bool:
        """Whether a called module is no layer, so that layers may be hidden inside."""
        module = self._modules[str(node.target)]
        return _kind_of_module(module) is None

    def _barrier(self, node: Node, parameter: nn.Parameter) -> str | None:
        return self._hidden.get(id(parameter)) or self.use.obstacle(node, parameter)

    def reads(self) -> list[WeightSite]:
        """Return what reads parameters besides layers."""
        found = []
        for source, root, readers in self._reads:
            path, parameter = self._parameters[str(root.target)]
            path = self.use.path_for(root, str(root.target), path)
            slot = slot_of_reads(path.rpartition(".")[2], source, readers)
            if slot is not None:
                against = obstacle_to_reads(parameter, slot) or self._barrier(root, parameter)
                found.append(WeightSite(root, READ, path, parameter, 1, against, slot, against))
        return found

    def layers_inside(self, node: Node) -> list[Bystander]:
        path = str(node.target)
        opaque = self._modules[path]
        reason = f"inside {path!r} ({type(opaque).__name__}), which the graph calls as a whole"
        return [Bystander(f"{path}.{inner}", node, reason) for inner in _layers_of(opaque) if inner]

    def is_used(self, path: str) -> bool:
        return any(
            f"{path}.{name}" in self._used for name, _ in self._modules[path].named_parameters(recurse=False)
        )

    def _uses_outside_sites(self) -> dict[int, str]:
        """Map each parameter that something other than a site reads to words about that reader."""
        outside: dict[int, str] = {}
        self._hidden: dict[int, str] = {}
        self._reads: list[tuple[Node, Node, list[Node]]] = []
        self._used: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "call_module" and self.is_opaque(node):
                for parameter in self._modules[str(node.target)].parameters():
                    if self.use.is_apart(parameter):
                        continue
                    words = _reader(node, self._modules[str(node.target)])
                    outside.setdefault(id(parameter), words)
                    self._hidden.setdefault(id(parameter), words)
            elif node.op == "get_attr" and node.target in self._parameters:
                self._used.add(str(node.target))
                for source, readers in self._readers_besides_sites(node):
                    self._reads.append((source, node, readers))
                    outside.setdefault(id(self._parameters[str(node.target)][1]), _reader(readers[0]))
        return outside

    def _readers_besides_sites(self, node: Node) -> Iterator[tuple[Node, list[Node]]]:
        """Yield what reads an expression, and that expression, for it and for all operators on it."""
        found = []
        for user in node.users:
            if user.op == "call_function" and user.target in WEIGHT_OPERATORS:
                yield from self._readers_besides_sites(user)
                continue
            kind = self._kind_of_call(user)
            slots = () if kind is None else slots_of_call(user, kind)
            if times_read(node, user) > sum(slot.read(user) is node for slot in slots):
                found.append(user)
        if found:
            yield node, found


def times_read(node: Node, reader: Node) -> int:
    """Return how often a node is among another's arguments, a count."""
    read: list[Node] = []
    map_arg((reader.args, reader.kwargs), read.append)
    return read.count(node)


def _reader(node: Node, module: nn.Module | None = None) -> str:
    described = f" ({type(module).__name__})" if module is not None else ""
    return f"its weight is also read by {node.name!r}{described}, which would not follow"


def innermost_path(node: Node) -> str:
    """Return the path of the innermost module that a node was traced in, empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def _groups_of(node: Node, kind: LayerKind) -> int:
    """Return ``groups`` of a functional convolution: its seventh argument, transposed or not."""
    if kind.kernel_axes == 0:
        return 1
    folded = fold_behind(ONE_WEIGHT[0].read(node))
    if folded is not None:
        return int(folded.kwargs.get("groups", 1))  # type: ignore[arg-type]
    groups: Any = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return int(groups)
