"""One walk over a graph that finds out, for each weight, whose activity it reads at each input channel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from biofx.analysis import (
    rules_attention,
    rules_elementwise,
    rules_join,
    rules_layers,
    rules_parts,
    rules_shape,
)
from biofx.analysis.components import smallest_connected
from biofx.analysis.compound import compound_layer
from biofx.analysis.dataflow import synaptic_nodes
from biofx.analysis.flow import NOTHING, Call, Flow, rule_for
from biofx.analysis.layout import Axis, Layout, LayoutError
from biofx.graph.node_kinds import changed_in_place, number_nodes
from biofx.graph.regions import RegionUse, region_input, region_output
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite

RULE_FILES = (rules_elementwise, rules_join, rules_layers, rules_shape, rules_parts, rules_attention)
"""Where the rules of torch's own operations stand."""


@dataclass(frozen=True)
class Source:
    """Units that begin somewhere, numbered one after another from ``first``."""

    kind: str
    """``"layer"``: outputs of a layer; ``"input"``: what depends on no weight; ``"open"``: outputs of an
    operation that ends groups; ``"nobody"``: constants."""
    name: str
    """Of a layer the path of its weight, else the node's name."""
    first: int
    count: int


@dataclass(frozen=True)
class Reading:
    """The units that one weight reads."""

    site: WeightSite
    units: Tensor
    """The unit at each input channel, int64, ``(input channels,)``."""
    nonnegative: bool
    """Whether the activity that it reads can never be negative."""
    layout: Layout | None = None
    """Where the units are in the value that it reads, None for units inside a layer."""


@dataclass
class Analysis:
    """What has been found so far; rules work on it through :class:`Call`."""

    graph_module: GraphModule
    flows: dict[Node, Flow] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    ended: dict[Node, str] = field(default_factory=dict)
    """Why groups of units end at a node."""
    norms: dict[Node, Flow] = field(default_factory=dict)
    """Normalisations, and what they give out."""
    produced: dict[str, Layout] = field(default_factory=dict)
    """The units of each layer, by the path of its weight."""
    comparisons: dict[Node, set[Node]] = field(default_factory=dict)
    """Operations that compare values, and the values they compare."""
    handed: dict[Node, str] = field(default_factory=dict)
    """What depends on no weight but on what Python hands to a region, and the path of the region."""
    _count: int = 0
    _pairs: list[Tensor] = field(default_factory=list)
    _compared: list[Tensor] = field(default_factory=list)
    _settled: dict[tuple[Node, tuple[Axis, ...], tuple[int, ...]], Layout] = field(default_factory=dict)
    _same: dict[Node, list[Flow]] = field(default_factory=dict)
    _columns: dict[str, Tensor] = field(default_factory=dict)
    _fed: set[Node] = field(default_factory=set)

    @classmethod
    def of(cls, graph_module: GraphModule) -> Analysis:
        """Analyse a graph."""
        made = cls(graph_module)
        made._walk()
        return made

    def roots(self) -> Tensor:
        """Return for each unit the number of the smallest one that it is one with."""
        pairs = torch.cat(self._pairs, 1) if self._pairs else torch.empty(2, 0, dtype=torch.int64)
        return smallest_connected(self._count, pairs)

    def compared(self) -> Tensor:
        """Return the units that comparisons read, int64."""
        return torch.cat(self._compared) if self._compared else torch.empty(0, dtype=torch.int64)

    # what rules ask for, through Call

    def end(self, node: Node, reason: str) -> Flow:
        """Say that groups end at a node; its output holds new units."""
        self.ended[node] = reason
        return Flow(origin=node)

    def settle(self, flow: Flow, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> Layout:
        """Return a flow's layout, decided to be along ``axes`` where it is open."""
        if flow.layout is not None:
            return flow.layout
        if flow.origin is None:
            raise LayoutError("it carries no units")
        key = (flow.origin, axes, shape)
        if key not in self._settled:
            kind = "open" if flow.origin in self._fed else "input"
            layout = Layout(self._new(kind, flow.origin.name, math.prod(shape)).reshape(shape), axes)
            self._settled[key] = layout
            for other in self._same.get(flow.origin, ()):
                self._unify(layout.labels, self.settle(other, axes, shape).labels)
        return self._settled[key]

    def known_layout(self, flow: Flow, axes: tuple[Axis, ...]) -> Layout | None:
        """Return the layout along ``axes`` that another reader has settled, None if none has."""
        found = [
            layout
            for (origin, on, _), layout in self._settled.items()
            if origin is flow.origin and on == axes
        ]
        return found[0] if len(found) == 1 else None

    def unify(self, node: Node, flows: Sequence[Flow]) -> Flow:
        """Return the flow of a result whose units are those of several values."""
        if not flows:
            return NOTHING
        ranks = {flow.rank for flow in flows}
        rank = ranks.pop() if len(ranks) == 1 else None
        known = [flow.layout for flow in flows if flow.layout is not None]
        if not known:
            if all(flow.origin is flows[0].origin for flow in flows):
                return Flow(origin=flows[0].origin, rank=rank)
            self._same[node] = list(flows)
            return Flow(origin=node, rank=rank)
        pattern = max(known, key=lambda layout: layout.labels.numel())
        shape = tuple(pattern.labels.shape)
        for flow in flows:
            layout = self.settle(flow, pattern.axes, shape)
            if layout.axes == pattern.axes and layout.labels.shape == pattern.labels.shape:
                self._unify(pattern.labels, layout.labels)
            elif not _is_single(layout):
                return self.end(node, "it joins units that lie along different axes, or differ in number")
        if rank is None and all(flow.rank is None or flow.rank <= _least(flows) for flow in flows):
            rank = max((flow.rank for flow in flows if flow.rank is not None), default=None)
        return Flow(layout=pattern, rank=rank)

    def unify_rows(self, table: Tensor) -> None:
        """Make all units of each row of a ``(rows, units)`` table one."""
        self._unify(table[:, :1].expand_as(table), table)

    def note_comparison(self, node: Node, operands: Iterable[Any]) -> None:
        """Remember that a node only compares some of its arguments."""
        nodes = {operand for operand in operands if isinstance(operand, Node)}
        self.comparisons.setdefault(node, set()).update(nodes)
        layouts = [self.flows[operand].layout for operand in nodes]
        self.compare(*(layout.labels.flatten() for layout in layouts if layout is not None))

    def nobody(self, count: int) -> Tensor:
        """Return units for constants, ``(count,)``."""
        return self._new("nobody", "constant", count)

    def moved_unknown(self, node: Node, flow: Flow) -> Flow:
        """Return a flow after its axes were moved about: units that are as unknown as before."""
        return Flow(origin=node, nonnegative=flow.nonnegative) if flow.origin is not None else NOTHING

    # the walk

    def _walk(self) -> None:
        modules = dict(self.graph_module.named_modules(remove_duplicate=False))
        sites: dict[Node, list[WeightSite]] = {}
        for site in find_sites(self.graph_module).found:
            if site.kind.why_no_units:
                continue
            sites.setdefault(site.node, []).append(site)
        synaptic = synaptic_nodes(self.graph_module)
        use = RegionUse(self.graph_module, self.graph_module.graph)
        numbers = number_nodes(self.graph_module, self.graph_module.graph)
        for node in self.graph_module.graph.nodes:
            self._note_what_feeds(node, node in synaptic)
            if node.op == "placeholder":
                self.flows[node] = Flow(origin=node)
            elif node in numbers:  # taken to keep its sign
                self.flows[node] = Flow(nonnegative=numbers[node] >= 0)
            elif node.op in ("get_attr", "output") or node.target is region_output:
                self.flows[node] = NOTHING
            elif node.target is region_input:
                region = node.args[0]
                self.flows[node] = self.end(node, f"what feeds it is not known: Python calls {region!r}")
            elif node not in sites and use.is_run_by_python(node):
                self.flows[node] = self.end(node, f"Python runs {node.target!r}")
            else:
                module = modules[str(node.target)] if node.op == "call_module" else None
                call = Call(node, module, self)
                self.flows[node] = self._layer(sites[node], call) if node in sites else self._apply(call)
                for changed in changed_in_place(node):
                    self.flows[changed] = self.flows[node]

    def _note_what_feeds(self, node: Node, is_synaptic: bool) -> None:
        """Note whether weights feed a node, or Python does, behind which there may be weights."""
        sources = [source for source in node.all_input_nodes if source in self._fed]
        if node.target is region_input:
            self.handed[node] = str(node.args[0])
        elif sources and not is_synaptic and all(source in self.handed for source in sources):
            self.handed[node] = self.handed[sources[0]]
        if is_synaptic or sources or node in self.handed:
            self._fed.add(node)

    def _apply(self, call: Call) -> Flow:
        """Return what the rule for an operation says of its result."""
        node = call.node
        rule = rule_for(node, call.module)
        sources = [self.flows[source] for source in node.all_input_nodes]
        if rule is None:
            if not any(flow.has_units or flow.parts for flow in sources):
                return Flow(origin=node) if call.module is not None and sources else NOTHING
            return self.end(node, f"no rule says what {_name(call)} does with units")
        try:
            return rule(call)
        except LayoutError as error:
            return self.end(node, str(error))

    def _layer(self, sites: list[WeightSite], call: Call) -> Flow:
        """Note what a layer reads, and return what it gives out."""
        site = sites[0]
        if site.kind.is_compound:
            return compound_layer(call, sites, self)
        source = call.argument(*site.kind.source)
        self.read(site, source, site.kind.channel_axis)
        made = self.made(site.parameter_path, site.output_channels, site.kind.channel_axis)
        given = self.flows[source] if isinstance(source, Node) else NOTHING
        rank = site.kind.kernel_axes + 2 if site.kind.kernel_axes else given.rank
        return Flow(layout=made, rank=rank)

    def made(self, path: str, count: int, position: int) -> Layout:
        """Return the units that a weight makes, the same however often it is used."""
        if path not in self.produced:
            self.produced[path] = Layout.along(self._new("layer", path, count), position)
        return self.produced[path]

    def read(self, site: WeightSite, source: Any, position: int) -> None:
        """Note that a weight reads the units of a value along an axis."""
        flow = self.flows[source] if isinstance(source, Node) else NOTHING
        size = site.input_channels
        if not flow.has_units and isinstance(source, Node):
            flow = Flow(origin=source, nonnegative=flow.nonnegative)
        try:
            layout = self.settle(flow, (Axis(position, (0,)),), (size,))
            columns = layout.columns(position, size)
        except LayoutError as error:
            self.ended[site.node] = f"what it reads is not known: {error}"
            columns = self.settle(Flow(origin=site.node), (Axis(position, (0,)),), (size,)).labels[:, None]
        self.unify_rows(columns)
        self.read_units(site, columns[:, 0], nonnegative=flow.nonnegative, layout=flow.layout)

    def read_units(
        self, site: WeightSite, units: Tensor, *, nonnegative: bool, layout: Layout | None = None
    ) -> None:
        """Note that a weight reads certain units, one at each input channel."""
        self._unify(self._columns.setdefault(site.parameter_path, units), units)
        self.readings.append(Reading(site, units, nonnegative, layout))

    def compare(self, *units: Tensor) -> None:
        """Note that units are only compared with each other."""
        self._compared += units

    def _new(self, kind: str, name: str, count: int) -> Tensor:
        self.sources.append(Source(kind, name, self._count, count))
        self._count += count
        return torch.arange(self._count - count, self._count)

    def _unify(self, left: Tensor, right: Tensor) -> None:
        if not _is_same_tensor(left, right):
            self._pairs.append(torch.stack((left.flatten(), right.flatten())))


def _is_same_tensor(left: Tensor, right: Tensor) -> bool:
    # an expanded tensor begins where the tensor begins that it is expanded from, so strides count
    same_place = left.data_ptr() == right.data_ptr() and left.dtype == right.dtype
    return same_place and left.shape == right.shape and left.stride() == right.stride()


def _is_single(layout: Layout) -> bool:
    return layout.labels.numel() == 1


def _least(flows: Sequence[Flow]) -> int:
    return max((flow.rank for flow in flows if flow.rank is not None), default=0)


def _name(call: Call) -> str:
    if call.module is not None:
        return f"a {type(call.module).__name__}"
    return str(getattr(call.node.target, "__name__", call.node.target))
