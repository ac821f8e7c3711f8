"""Which units can become an excitatory and an inhibitory copy without changing what the model computes.

All layers that make the units of a group, all weights that read them, and everything between must go along:
operations that name a number of channels, or that bring in a tensor with one entry per channel, cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from biofx.analysis import rules_elementwise as elementwise
from biofx.analysis import rules_join as join
from biofx.analysis import rules_layers as layers
from biofx.analysis import rules_shape as shape
from biofx.analysis.analysis import Reading, Source
from biofx.analysis.flow import Flow, Rule, rule_for
from biofx.analysis.groups import UnitGroups
from biofx.analysis.layout import Axis
from biofx.graph.regions import region_output
from biofx.layers.weight_site import WeightSite
from biofx.plasticity.model_states import kept_state
from biofx.rewriting.gains import has_own_bias, shared_parameters

_ANY_NUMBER_OF_CHANNELS: frozenset[Rule] = frozenset(
    {
        *(elementwise.keeps, elementwise.never_negative, elementwise.perhaps_negative, elementwise.bounded),
        *(join.added, join.multiplied, join.divided, join.chosen, join.masked, join.joined),
        *(layers.normalised, layers.pooled_over_space),
        *(shape.flattened, shape.reshaped, shape.reduced, shape.axis_removed, shape.axis_inserted),
        *(shape.permuted, shape.transposed),
    }
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
_ARITHMETIC: frozenset[Rule] = frozenset(
    {join.added, join.multiplied, join.divided, join.chosen, join.masked, elementwise.bounded}
)
_ACROSS_CHANNELS = frozenset({F.normalize})
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass
class Circuit:
    """Units that must be expanded together: who makes them, who reads them, and what is between."""

    sources: list[Source] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def circuits(groups: UnitGroups) -> list[Circuit]:
    """Return what belongs together, in execution order."""
    graph: nx.Graph = nx.Graph()
    for source in groups.sources:
        numbers = torch.arange(source.first, source.first + source.count)
        graph.add_edges_from((source, home) for home in groups.home(numbers).sources)
    for number, reading in enumerate(groups.readings):
        graph.add_edges_from((source, number) for source in groups.home(reading.units).sources)
    for node, flow in groups.flows.items():
        for entry in _tensors(flow):
            if entry.layout is not None and entry.layout.labels.numel():
                homes = groups.home(entry.layout.labels.flatten()).sources
                graph.add_edges_from((source, node) for source in homes)
    found = []
    for members in nx.connected_components(graph):
        circuit = Circuit()
        circuit.sources = sorted((m for m in members if isinstance(m, Source)), key=lambda s: s.first)
        circuit.readings = [
            groups.readings[number] for number in sorted(m for m in members if isinstance(m, int))
        ]
        circuit.nodes = sorted(member for member in members if isinstance(member, Node))
        found.append(circuit)
    return sorted(found, key=lambda circuit: circuit.sources[0].first)


def _tensors(flow: Flow) -> Iterator[Flow]:
    yield flow
    for part in flow.parts or ():
        yield from _tensors(part)


class Expandability:
    """Says of circuits whether they can be expanded; what it must know of the model is gathered once.

    Args:
        groups: the units of the graph.
        graph_module: the model.
        makers: the uses of each weight, by its path.
    """

    def __init__(
        self, groups: UnitGroups, graph_module: GraphModule, makers: Mapping[str, Sequence[WeightSite]]
    ) -> None:
        self._groups = groups
        self._graph_module = graph_module
        self._makers = makers
        self._making = {site.node for sites in makers.values() for site in sites}
        self._shared = shared_parameters(graph_module)
        self._calls = Counter(str(node.target) for node in graph_module.graph.find_nodes(op="call_module"))

    def why_not(self, circuit: Circuit) -> str | None:
        """Return why a circuit cannot be expanded, None if it can."""
        for source in circuit.sources:
            if source.kind != "layer":
                region = self._groups.handed.get(source.name)
                if region is not None:
                    return f"what makes its units is not known: Python calls {region!r}"
                return f"no layer makes its units: they begin at {source.name!r}"
            reason = self._used_without_units(source.name)
            reason = reason or self._unmakeable(self._makers[source.name][0]) or self._is_plastic(source.name)
            if reason is not None:
                return f"its units are made by {source.name!r}: {reason}"
        for reading in circuit.readings:
            path = reading.site.parameter_path
            reason = self._used_without_units(path) or _obstacle(reading.site) or _unreadable(reading)
            reason = reason or self._is_plastic(path)
            if reason is not None:
                return f"its units are read by {reading.site.parameter_path!r}: {reason}"
        inside = set(circuit.nodes)
        readers = {reading.site.node for reading in circuit.readings}
        for node in circuit.nodes:
            reason = None if node in self._making else self._names_channels(node, inside)
            if reason is not None:
                return f"its units go through {node.name!r}, {reason}"
            for user in node.users:
                if user.op == "output":
                    return "its units are an output of the model"
                if user.target is region_output:
                    return f"what reads its units is not known: Python calls {user.args[0]!r}"
                if user not in inside and user not in readers and self._groups.flows[user].has_units:
                    return f"its units go into {user.name!r}, behind which they are not known"
        return None

    def _used_without_units(self, path: str) -> str | None:
        """Return words about a use of a weight in which its entries are not from one unit to another."""
        uses = (site for site in self._makers[path] if site.kind.why_no_units)
        return next((f"{site.node.name!r} reads it too: {site.kind.why_no_units}" for site in uses), None)

    def _unmakeable(self, site: WeightSite) -> str | None:
        reason = _obstacle(site)
        if reason is None and not has_own_bias(self._graph_module, site, self._shared):
            return "its bias is not the layer's alone"
        return reason

    def _is_plastic(self, path: str) -> str | None:
        """Return what is kept for each synapse of a weight already, None if nothing is."""
        state = kept_state(self._graph_module, path)
        if state is not None and (state.has_factors or state.target_strength is not None):
            return "its synapses have learning rates or target strengths already; expand the original first"
        return None

    def _names_channels(self, node: Node, inside: Set[Node]) -> str | None:
        """Return why an operation would not work with twice the channels, None if it would."""
        module = self._graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        rule = rule_for(node, module)
        layout = self._groups.flows[node].layout
        if rule not in _ANY_NUMBER_OF_CHANNELS or node.target in _ACROSS_CHANNELS:
            return "which is made for a certain number of channels"
        if layout is None or len(layout.axes) != 1 or layout.labels.dim() != 1:
            return "where they do not lie along one axis"
        if module is not None and self._calls[str(node.target)] > 1 and _has_state(module):
            return "a module that is called more than once"
        if rule is layers.normalised:
            return _unnormalisable(module, layout.axes[0])
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            return "which has a slope for each"
        if module is not None and _has_state(module) and not isinstance(module, nn.PReLU):
            return f"a {type(module).__name__}, which has parameters for a number of channels"
        if _draws_for_each(node, module):
            return "whose noise is drawn for each channel by itself; use nn.Dropout"
        if isinstance(module, DROPOUTS) and layout.axes[0].dims not in ((0,), (0, None)):
            return "which drops entries of them in another order"
        if rule is shape.reshaped and _is_named(node, layout.axes[0].position):
            return "which names a number of channels; write -1"
        for source in node.all_input_nodes:
            if source not in inside and not self._is_neutral(source, is_arithmetic=rule in _ARITHMETIC):
                return f"together with {source.name!r}, which has no units that are known"
        return None

    def _is_neutral(self, source: Node, *, is_arithmetic: bool) -> bool:
        """Whether a node is a size, or a tensor of one entry; in arithmetic no size may count channels."""
        if source.op == "get_attr":
            value: object = self._graph_module
            for part in str(source.target).split("."):
                value = getattr(value, part)
            return not isinstance(value, torch.Tensor) or value.numel() == 1
        flow = self._groups.flows[source]
        if is_arithmetic:
            return flow.number is None and flow.size_of == 1
        return flow.number is not None or (source.target is not getattr and _is_size(source))


def _unnormalisable(module: nn.Module | None, axis: Axis) -> str | None:
    """Return why a normalisation could not have twice the channels, None if it could."""
    is_plain = isinstance(module, _INSTANCE_NORMS) and not _has_state(module)
    if not isinstance(module, NORMS) and not is_plain:
        return "a normalisation that is not one of torch's modules for a number of channels"
    if axis.dims != (0,):
        return "which normalises the entries of a flattened map"
    if isinstance(module, nn.LayerNorm) and (len(module.normalized_shape) != 1 or axis.position != -1):
        return "which normalises other axes than theirs too"
    return None


def _draws_for_each(node: Node, module: nn.Module | None) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    noisy = isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout | nn.RReLU)
    return noisy or "rrelu" in name or ("dropout" in name and module is None)


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _obstacle(site: WeightSite) -> str | None:
    if site.kind.is_compound:
        return f"a {site.kind.name} has several weights, whose sizes hang together"
    if site.kind.is_product:
        return f"it is a factor of {site.kind.name}, not the weight of a layer"
    if site.operators:
        return "its weight is constrained or scaled already"
    return site.obstacle


def _unreadable(reading: Reading) -> str | None:
    axis = run_of(reading)
    if axis is None or axis.dims not in ((0,), (0, None), (None, 0)):
        return "its input channels are not simply its units, or runs of them"
    return None


def run_of(reading: Reading) -> Axis | None:
    """Return the axis along which a weight reads units."""
    layout = reading.layout
    if layout is None or layout.labels.dim() != 1:
        return None
    return layout.axis_at(reading.site.kind.channel_axis)


def _is_named(node: Node, position: int) -> bool:
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], Node):
        return True  # sizes computed as a whole, with numbers in them that are not seen here
    size = list(sizes)[position]
    return isinstance(size, int) and size != -1


def _is_size(node: Node) -> bool:
    while True:
        if node.op == "call_method" and node.target in ("size", "dim", "numel"):
            return True
        if node.target is getattr:
            return node.args[1] in ("shape", "ndim")
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
