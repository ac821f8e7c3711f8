"""Weight sites: the places in a graph where a layer's weight meets its input.

A site is either a call of a layer module (``call_module fc``) or, once lowered, a call of the layer's
function on a visible weight expression (``linear(x, scale_gradient(fc.weight, …), fc.bias)``). Code that a
user wrote in the second form is a site like any other. A recurrent layer or an attention has several
weights, and so several sites at one node, each with a role.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn.utils.parametrize import is_parametrized

from biofx.graph.analysis_cache import cached_on_graph
from biofx.graph.joined_graph import whole_graph
from biofx.graph.modules_by_path import modules_by_path
from biofx.graph.node_kinds import queries_metadata
from biofx.graph.regions import RegionUse, graph_breaks_of, innermost_around
from biofx.layers import COMPOUND_KINDS, dense_kind_of, kind_of, kind_of_call
from biofx.layers.computed_weight import Computations, ComputedWeight, SignFate, read_outside, turned
from biofx.layers.constant_part import ConstantPart
from biofx.layers.layer_kind import LayerKind, WeightSlot, argument, computed, lowering_blocker
from biofx.layers.weight_site import (
    READ,
    WEIGHT_OPERATORS,
    Sites,
    SubWeightSlot,
    UnsupportedLayer,
    WeightSite,
    computed_behind,
    fold_behind,
    named_parameters,
    parameter_behind,
    read_blocker,
    sign_blocker,
    slot_of_reads,
    sum_behind,
    weight_blocker,
    whole_weight,
)

NEVER_CALLED = "never called in the forward"
"""Why a layer has no site that the forward, as it was captured, does not use."""


@cached_on_graph
def find_sites(graph_module: GraphModule) -> Sites:
    """Return every weight site of a graph, and every layer that has none with the reason."""
    found: list[WeightSite] = []
    unsupported: list[UnsupportedLayer] = []
    hidden: list[UnsupportedLayer] = []
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
                unsupported.append(entry)
    found = _agreeing(found)
    visible = {site.layer for site in found}
    unsupported += [entry for entry in hidden if entry.layer not in visible]
    seen = visible | {layer.layer for layer in unsupported}
    seen |= {str(node.target) for node in survey.graph.nodes if node.op == "call_module"}
    seen |= {innermost_path(site.node) for site in found}  # of a tied weight, the layer that is called
    unsupported += [
        UnsupportedLayer(path, None, _why_not_seen(path, graph_breaks_of(graph_module)))
        for path in _layers_of(graph_module)
        if path not in seen and not survey.is_used(path)
    ]
    return Sites(found, unsupported, survey.reads())


def _agreeing(found: list[WeightSite]) -> list[WeightSite]:
    """Return sites, those of a weight blocked where one reads its sign and another does not."""
    ways: dict[int, set[object]] = {}
    for site in (site for site in found if not site.kind.why_no_units):
        fate = SignFate.KEPT if site.computation is None else site.computation.fate
        way = (fate, site.kind.input_axis) if site.signs_parameter else (fate, site.where_signed.kind)
        ways.setdefault(id(site.parameter), set()).add(way)
    mixed = {key for key, kinds in ways.items() if len(kinds) > 1}
    reason = (
        "the forward reads its weight in several ways (computed, transposed), which one sign would not suit"
    )

    def blocked(site: WeightSite) -> WeightSite:
        is_mixed = id(site.parameter) in mixed
        return replace(site, value_blocker=site.value_blocker or reason) if is_mixed else site

    return [blocked(site) for site in found]


def _why_not_seen(path: str, kept: Mapping[str, str]) -> str:
    around = innermost_around(path, kept)
    if around is None:
        return NEVER_CALLED
    owner = f"module {around!r}" if around else "the model"
    return f"only Python calls it, if anything does: the forward of {owner} runs in Python"


def _layers_of(root: nn.Module) -> Iterator[str]:
    """Yield the paths of all layers, each module once; the output projection is part of its attention."""
    parts: set[int] = set()
    for path, module in root.named_modules():
        if kind_of(module) in COMPOUND_KINDS:
            yield path
            parts.update(map(id, module.children()))
        elif kind_of(module) is not None and id(module) not in parts:
            yield path


def _computed_weight(module: Any, kind: LayerKind) -> nn.Parameter:
    """Return something of a weight's shape and type; to compute it would be a step of spectral norm."""
    shape = kind.computed_shape(module)
    held = list(module.parametrizations.parameters()) if is_parametrized(module) else []
    like = held[0] if held else torch.zeros(())
    empty = torch.zeros((), dtype=like.dtype, device=like.device).expand(shape)
    return nn.Parameter(empty, requires_grad=not held or any(entry.requires_grad for entry in held))


class _Survey:
    """One walk over a graph, with the tables it needs built once."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph = whole_graph(graph_module)
        self.use = RegionUse(graph_module, self.graph)
        self._modules = modules_by_path(graph_module)
        self._computed: dict[str, nn.Parameter] = {}
        self._parameters = named_parameters(graph_module)
        self._held = _held_nodes(self.graph)
        self._computations = Computations(
            {path: parameter for path, (_, parameter) in self._parameters.items()},
            lambda: ConstantPart(graph_module, self.graph),
        )
        self._computing = self._nodes_computing()
        self._outside = self._uses_outside_sites()

    def sites_at(self, node: Node) -> Iterator[WeightSite | UnsupportedLayer]:
        """Yield the site of each weight that a node reads as a layer."""
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            kind = kind_of(module)
            if kind is not None:
                yield from self._sites_of_module(node, module, kind)
        elif (kind := self._kind_of_call(node)) is not None:
            for slot in kind.slots_of_call(node):
                yield from self._sites_of_call(node, kind, slot)

    def _sites_of_module(
        self, node: Node, module: nn.Module, kind: LayerKind
    ) -> Iterator[WeightSite | UnsupportedLayer]:
        slots = kind.slots_of_module(module)
        blocker = lowering_blocker(node, module, kind, slots)
        groups: Any = getattr(module, "groups", 1)
        for slot in slots:
            path = f"{node.target}.{slot.name}"
            if kind.is_compound and path not in self._parameters:
                yield UnsupportedLayer(path.rpartition(".")[0], node, f"{slot.name}: {computed(slot.name)}")
            else:
                yield self._site(node, kind, slot, path, groups, blocker)

    def _sites_of_call(
        self, node: Node, kind: LayerKind, slot: WeightSlot
    ) -> Iterator[WeightSite | UnsupportedLayer]:
        """Yield the site of the weight that a call reads at a slot, one for each where it adds several up."""
        added_up = sum_behind(slot.read(node))
        for number in range(1 if added_up is None else len(added_up.args)):
            own = slot if added_up is None else SubWeightSlot(**vars(slot), number=number)
            yield self._site_of_call(node, kind, own)

    def _site_of_call(self, node: Node, kind: LayerKind, slot: WeightSlot) -> WeightSite | UnsupportedLayer:
        weight = slot.read(node)
        whole = slot.whole(node) if isinstance(slot, SubWeightSlot) else weight
        root, folded = parameter_behind(weight), fold_behind(whole)
        path = computed_behind(weight)
        if path is not None and path.rpartition(".")[0] not in self._modules:
            path = None  # an attribute of a tensor
        if path is None and root is not None and root.target in self._parameters:
            path = str(root.target)
        computation = self._computation(node, kind, slot) if path is None else None
        if isinstance(computation, ComputedWeight):
            path = str(computation.root.target)
            kind = turned(kind) if computation.is_turned else kind
        elif path is None:
            why = "" if computation is None else f": {computation}"
            reason = f"its weight is {weight}, computed in the graph, not a parameter{why}"
            return UnsupportedLayer(innermost_path(node), node, reason)
        blocker = None
        if folded is not None:
            blocker = f"its weight is folded already ({folded.name}); what acts on weights goes before folds"
        site = self._site(node, kind, slot, path, _groups_of(node, kind), blocker)
        if not isinstance(computation, ComputedWeight):
            return site
        against = site.value_blocker or self._why_no_sign(computation)
        return replace(site, value_blocker=against, computation=computation)

    def _computation(self, node: Node, kind: LayerKind, slot: WeightSlot) -> ComputedWeight | str | None:
        """Return how a layer's weight is computed, or why that is not known; None if it follows from data."""
        weight = slot.read(node)
        if kind.is_compound or not isinstance(weight, Node) or weight not in self._held:
            return None
        found = self._computations.of_weight(weight, kind)
        if isinstance(found, str):
            return found
        owner = self._modules.get(str(found.root.target).rpartition(".")[0])
        layer = None if owner is None else dense_kind_of(owner)
        if layer is not None and layer.transposed is not (kind.transposed is not found.is_turned):
            return f"it is the weight of a {layer.name} the other way round"
        return found

    def _why_no_sign(self, computation: ComputedWeight) -> str | None:
        """Return why a computed weight can be given no signs, None if it can."""
        if computation.fate is SignFate.UNKNOWN:
            return f"its weight is computed from {computation.root.target}, and {computation.why}"
        if computation.fate is SignFate.BUILT_IN:
            return (
                f"its signs are built in: the forward computes its weight by {computation.words}, with a "
                "fixed sign for each presynaptic unit, which other weights that read the unit follow"
            )
        if computation.fate is SignFate.LOST:
            other = read_outside(computation, self._is_of_a_weight)
            return None if other is None else _reader(other)
        return None

    def _is_of_a_weight(self, node: Node, weight: Node) -> bool:
        """Whether a node computes a weight, acts on one, or is a layer whose weight is another node."""
        if node in self._computing or (node.op == "call_function" and node.target in WEIGHT_OPERATORS):
            return True
        kind = self._kind_of_call(node)
        return kind is not None and any(slot.read(node) is weight for slot in kind.slots_of_call(node))

    def _nodes_computing(self) -> set[Node]:
        """Return the nodes that compute the weights of layers."""
        found: set[Node] = set()
        for node in self.graph.nodes:
            kind = None if node.op == "call_module" else self._kind_of_call(node)
            if kind is None:
                continue
            for slot in kind.slots_of_call(node):
                computation = self._computation(node, kind, slot)
                if isinstance(computation, ComputedWeight):
                    found.update(computation.nodes)
        return found

    def _site(
        self, node: Node, kind: LayerKind, slot: WeightSlot, path: str, groups: int, blocker: str | None
    ) -> WeightSite:
        """Return the site of the weight under a path: a parameter, or computed by a parametrization."""
        is_computed = path not in self._parameters
        if is_computed:
            owner = self._modules[path.rpartition(".")[0]]
            weight = self._computed.setdefault(path, _computed_weight(owner, kind))
            against: str | None = computed(slot.name)
        else:
            first, weight = self._parameters[path]
            path = self.use.path_for(node, path, first)
            against = self._outside.get(id(weight)) or sign_blocker(weight)
        blocker = blocker or self._lowering_blocker(node, weight)
        if node.op != "call_module":
            blocker = blocker or kind.blocker(node, None)
        whole = whole_weight(path)
        known = self._parameters.get(whole) if whole != path else None
        return WeightSite(
            *(node, kind, path, weight, groups, blocker or against, slot, blocker),
            is_computed=is_computed,
            first=None if known is None else known[1],
        )

    def _kind_of_call(self, node: Node) -> LayerKind | None:
        """Return the kind of a call; a product is a layer where a matrix of parameters is its factor."""
        kind = kind_of_call(node)
        if kind is None or not kind.is_product:
            return kind
        slot = kind.slots_of_call(node)[0]
        root = parameter_behind(slot.read(node))
        if root is None and isinstance(found := self._computation(node, kind, slot), ComputedWeight):
            root = found.root
        named = None if root is None else self._parameters.get(str(root.target))
        if argument(node, *kind.source) in self._held:
            return None  # it computes a weight from others
        bias = argument(node, 0, "input") if 0 not in (kind.source[0], kind.argument[0]) else None
        added_to_data = isinstance(bias, Node) and parameter_behind(bias) is None
        return None if named is None or named[1].dim() != kind.matrix_axes or added_to_data else kind

    def is_opaque(self, node: Node) -> bool:
        """Whether a called module is no layer, so that layers may be hidden inside."""
        module = self._modules[str(node.target)]
        return kind_of(module) is None

    def _lowering_blocker(self, node: Node, parameter: nn.Parameter) -> str | None:
        hidden = self._hidden.get(id(parameter)) or self.use.obstacle(node, parameter)
        return hidden or weight_blocker(parameter)

    def reads(self) -> list[WeightSite]:
        """Return what reads parameters besides layers."""
        found = []
        for source, root, readers in self._reads:
            path, parameter = self._parameters[str(root.target)]
            path = self.use.path_for(root, str(root.target), path)
            slot = slot_of_reads(path.rpartition(".")[2], source, readers)
            if slot is not None:
                against = read_blocker(parameter, slot) or self._lowering_blocker(root, parameter)
                found.append(WeightSite(root, READ, path, parameter, 1, against, slot, against))
        return found

    def layers_inside(self, node: Node) -> list[UnsupportedLayer]:
        path = str(node.target)
        opaque = self._modules[path]
        reason = f"inside {path!r} ({type(opaque).__name__}), which the graph calls as a whole"
        return [UnsupportedLayer(f"{path}.{inner}", node, reason) for inner in _layers_of(opaque) if inner]

    def is_used(self, path: str) -> bool:
        return any(
            f"{path}.{name}" in self._used for name, _ in self._modules[path].named_parameters(recurse=False)
        )

    def _uses_outside_sites(self) -> dict[int, str]:
        """Map each parameter that something other than a site reads to a message about that reader."""
        outside: dict[int, str] = {}
        self._hidden: dict[int, str] = {}
        self._reads: list[tuple[Node, Node, list[Node]]] = []
        self._used: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "call_module" and self.is_opaque(node):
                for parameter in self._modules[str(node.target)].parameters():
                    if self.use.is_apart(parameter):
                        continue
                    message = _reader(node, self._modules[str(node.target)])
                    outside.setdefault(id(parameter), message)
                    self._hidden.setdefault(id(parameter), message)
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
            if user in self._computing or queries_metadata(user):
                continue
            kind = self._kind_of_call(user)
            slots = () if kind is None else kind.slots_of_call(user)
            if times_read(node, user) > sum(slot.read(user) is node for slot in slots):
                found.append(user)
        if found:
            yield node, found


def _held_nodes(graph: Graph) -> set[Node]:
    """Return the nodes that follow from what the model holds, and not from its input."""
    found: set[Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        is_call = node.op in ("call_function", "call_method") and bool(sources)
        if node.op == "get_attr" or (is_call and all(source in found for source in sources)):
            found.add(node)
    return found


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
    folded = fold_behind(kind.slots_of_call(node)[0].read(node))
    if folded is not None:
        return int(folded.kwargs.get("groups", 1))  # type: ignore[arg-type]
    groups: Any = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return int(groups)
