"""What the analysis of units found, in the terms of a user: groups of units, who makes and who reads them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from biofx.analysis.connected_units import representatives
from biofx.analysis.drives import drive_signs
from biofx.analysis.observation import (
    DISAGREES,
    GIVE_EXAMPLES,
    NOT_OBSERVED,
    Observation,
    observation_of,
    weight_key,
)
from biofx.analysis.synapses import only_compared, synaptic_nodes
from biofx.analysis.units import Reading, Source, UnitAnalysis
from biofx.errors import InputError
from biofx.graph.analysis_cache import cached_on_graph
from biofx.graph.joined_graph import whole_view
from biofx.graph.printing import function_name
from biofx.html_tables import folded, paragraph, table
from biofx.layers.weight_site import WeightSite

_PRODUCTS = frozenset(
    {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "mv"}
)


_SHOWN, _ROWS = 5, 200
_LONGEST = 200


def shortened(text: str) -> str:
    """Return a text that fits a line or two."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@dataclass(frozen=True)
class UnitGroup:
    """Units that some layers make together, and the weights that read them."""

    producers: tuple[str, ...]
    """Paths of the weights whose outputs they are, and names of nodes where no layer makes them."""
    readers: tuple[str, ...]
    """Paths of the weights that read them."""
    units: int
    """How many there are, a count."""
    nonnegative: bool
    """Whether every weight reads activity that cannot be negative, so that a sign is that of an effect."""

    def __str__(self) -> str:
        activity = "" if self.nonnegative else " (activity may be negative)"
        return f"{self.units} units of {', '.join(self.producers)} -> {', '.join(self.readers)}{activity}"


def _sign(group: UnitGroup) -> str:
    return "not negative" if group.nonnegative else "of either sign"


@dataclass(frozen=True)
class UnitSources:
    """The sources of some units, and the place of each unit in them."""

    sources: list[Source]
    """In execution order, each once."""
    index: Tensor
    """For each unit its place in the sources laid one after another, int64."""


class UnitGroups:
    """The presynaptic units of every weight of a graph; iterating gives the groups."""

    def __init__(self, analysis: UnitAnalysis, observation: Observation | None = None) -> None:
        self._analysis = analysis
        self.count = analysis.count
        """How many numbers of units there are; units that are one have several."""
        self.sources = analysis.sources
        """Where units begin, in execution order."""
        self.readings = analysis.readings
        """What each weight reads, in execution order."""
        self.values = analysis.values
        """What is known of each node's value."""
        self.ends = analysis.ended
        """Where groups end, and why."""
        self.regions = {node.name: region for node, region in analysis.fed_by_region.items()}
        """Names of nodes that depend on no weight but on what Python passes to a region, and that region."""
        norms = analysis.norms.items()
        acting = {node: value.layout.labels for node, value in norms if value.layout is not None}
        self.norms = acting if observation is None else observation.by_node(acting)
        """The units that each normalisation acts on; those that act on none that are known are left out."""
        self._produced = analysis.produced
        self._representatives = representatives(analysis)
        self._found_sources: dict[int, tuple[Tensor, UnitSources]] = {}
        """By the identity of the units, which are held, so that it stays theirs."""
        self._some_are_open = any(source.kind == "open" for source in analysis.sources)
        self._firsts = [source.first for source in analysis.sources]
        self._starts = torch.tensor(self._firsts)
        self._observation = observation
        self._by_use = {(entry.site.node, entry.site.parameter_path): entry for entry in self.readings}
        self._by_weight: dict[Hashable, Reading] = {}
        for entry in self.readings if observation is not None else ():
            known = self._by_weight.setdefault(weight_key(entry.site), entry)
            if known.nonnegative and not entry.nonnegative:
                self._by_weight[weight_key(entry.site)] = entry
        graph_module = analysis.graph_module
        compared = only_compared(graph_module.graph, analysis.comparisons, synaptic_nodes(graph_module))
        self._compared_only = compared if observation is None else observation.always(compared)
        self._is_exempt = torch.zeros(self.count, dtype=torch.bool)
        for units in analysis.compared:
            self._is_exempt[self._representatives[units]] = True
        for reading in self.readings:
            self._is_exempt[self._representatives[reading.units]] = False
        self._compared_units = bool(self._is_exempt.any())

    def __iter__(self) -> Iterator[UnitGroup]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        shown = [shortened(str(group)) for group in self._groups[:_SHOWN]]
        more = len(self) - len(shown)
        shown += [f"and {more} more"] if more else []
        return f"<{type(self).__name__}, {len(self)}: {'; '.join(shown)}>"

    def _repr_html_(self) -> str:
        rows = [
            (group.units, *(", ".join(names) for names in (group.producers, group.readers)), _sign(group))
            for group in self._groups[:_ROWS]
        ]
        ends = [(node.name, reason) for node, reason in [*self.ends.items()][:_ROWS]]
        left = max(0, len(self) - _ROWS)
        return "".join(
            (
                table(["units", "made by", "read by", "activity"], rows),
                paragraph(f"and {left} more groups; print them to see all") if left else "",
                folded(f"ends: {len(self.ends)}", table(["at", "why"], ends)) if ends else "",
            )
        )

    def __str__(self) -> str:
        lines = [str(group) for group in self._groups]
        lines += [f"ends at {node.name}: {reason}" for node, reason in self.ends.items()]
        return "\n".join(lines)

    def representatives(self, units: Tensor) -> Tensor:
        """Return for each unit the one that represents all that are one with it."""
        return self._representatives[units]

    def sources_of(self, units: Tensor) -> UnitSources:
        """Return where the representatives of units begin; nobody changes ``units`` later."""
        known = self._found_sources.get(id(units))
        if known is None:
            known = self._found_sources[id(units)] = units, self._find_sources(units)
        return known[1]

    def _find_sources(self, units: Tensor) -> UnitSources:
        representatives = self._representatives[units]
        if len(units):  # mostly one layer makes them all
            ends = (int(end) for end in representatives.aminmax())
            first, last = (bisect_right(self._firsts, end) - 1 for end in ends)
            if first == last:
                source = self.sources[first]
                return UnitSources([source], representatives - source.first)
        sources = torch.bucketize(representatives, self._starts, right=True) - 1
        order, place = sources.unique(return_inverse=True)
        found = [self.sources[number] for number in order.tolist()]
        before = accumulate((source.count for source in found), initial=0)
        offsets = [start - source.first for start, source in zip(before, found, strict=False)]
        return UnitSources(found, representatives + torch.tensor(offsets, dtype=torch.int64)[place])

    def producers(self) -> list[str]:
        """Return the paths of the weights that make units, in execution order."""
        return list(self._produced)

    def made_by(self, path: str) -> Tensor:
        """Return the units that a weight makes, one for each output, int64."""
        return self._produced[path].labels

    def region_that_feeds(self, site: WeightSite) -> str | None:
        """Return the region to which Python passes all that a site reads, None if known units feed it."""
        sources = self.sources_of(self.reading(site).units).sources
        regions = [self.regions.get(source.name) for source in sources if source.kind == "open"]
        known = any(source.kind == "layer" for source in sources)
        return None if known or None in regions else next(iter(regions), None)

    def why_not_known(self, site: WeightSite) -> str | None:
        """Return why it is not known what a site reads, None if it is."""
        if self._observation is None:
            return None
        reason = None
        if weight_key(site) not in self._by_weight:
            reason = NOT_OBSERVED
        elif weight_key(site) in self._observation.disputed:
            reason = DISAGREES
        elif self._observation.is_traced:
            where = next(iter(self.where_units_begin(site)), None)
            if where is not None:
                reason = f"{self.why_ended.get(where, f'its units begin at {where!r}')}; {GIVE_EXAMPLES}"
        return None if reason is None else f"what feeds it is not known: {reason}"

    def is_in_python(self, site: WeightSite) -> bool:
        """Whether an eager forward uses a weight, so that nothing can be put between it and its layer."""
        return self._observation is not None and weight_key(site) in self._observation.in_python

    def where_units_begin(self, site: WeightSite) -> list[str]:
        """Return the names of operations that end what is known, and whose units a weight reads as its own.

        At one of its uses: what it reads at another does not say that units lie at the same places there.
        """
        if not self._some_are_open:
            return []
        readings = self._readings_of.get(weight_key(site), [])
        numbers = torch.cat([self._apart[reading.units] for reading in readings]).unique()
        found = torch.bucketize(numbers, self._starts, right=True) - 1
        sources = [self.sources[number] for number in found.unique().tolist()]
        return [source.name for source in sources if source.kind == "open"]

    @cached_property
    def _apart(self) -> Tensor:
        return representatives(self._analysis, by_columns=False)

    @cached_property
    def _readings_of(self) -> dict[Hashable, list[Reading]]:
        found: dict[Hashable, list[Reading]] = {}
        for reading in self.readings:
            found.setdefault(weight_key(reading.site), []).append(reading)
        return found

    @cached_property
    def why_ended(self) -> Mapping[str, str]:
        """Why groups end, by the names of the nodes."""
        return {node.name: reason for node, reason in self.ends.items()}

    def reading(self, site: WeightSite) -> Reading:
        """Return what a site reads."""
        if self._observation is not None:
            return self._by_weight[weight_key(site)]
        return self._by_use[site.node, site.parameter_path]

    def is_exempt(self, units: Tensor) -> Tensor:
        """Return whether units are only compared with each other, bool."""
        if not self._compared_units:
            return torch.zeros(units.shape, dtype=torch.bool)
        return self._is_exempt[self._representatives[units]]

    def weighed_besides(self, site: WeightSite) -> str | None:
        """Return the name of a product that is no layer and reads some of the units that a site reads."""
        if not self._products:
            return None
        own = self._representatives[self.reading(site).units].unique()
        for node, units in self._products.items():
            if bool(torch.isin(units, own).any()):
                return node.name
        return None

    @cached_property
    def _products(self) -> dict[Node, Tensor]:
        """The units that products read which are no layers: what is weighed there has no signs."""
        found: dict[Node, Tensor] = {}
        for node in self.ends:
            if function_name(node.target) not in _PRODUCTS or node in self._analysis.sites:
                continue
            values = [self.values[source] for source in node.all_input_nodes]
            labels = [value.layout.labels.flatten() for value in values if value.layout is not None]
            if len(labels) == 1:  # of two, one mixes the other
                found[node] = self._representatives[labels[0]].unique()
        return found

    def drive_sign(self, site: WeightSite) -> int:
        """Return with which sign acts what a weight drives: 1, -1 where it is subtracted, 0 for both."""
        return self._drive_signs.get(weight_key(site), 1)

    @cached_property
    def _drive_signs(self) -> dict[Hashable, int]:
        by_node = drive_signs(self._analysis)
        found: dict[Hashable, int] = {}
        for reading in self.readings:
            sign = by_node.get(reading.site.node, 1)
            known = found.setdefault(weight_key(reading.site), sign)
            found[weight_key(reading.site)] = sign if sign == known else 0
        return found

    def exempt_rows(self, site: WeightSite) -> Tensor:
        """Return which outputs of a site are only compared with each other, bool, ``(output channels,)``.

        Queries and keys decide where attention goes; nothing of theirs is passed on to another unit.
        """
        rows = site.parameter.shape[1 if site.kind.transposed else 0]
        if site.role in ("query", "key") or (site.node in self._compared_only and not site.kind.is_compound):
            return torch.ones(rows, dtype=torch.bool)
        made = self._produced.get(site.whole_path)
        if made is None or len(made.labels) != rows:
            return torch.zeros(rows, dtype=torch.bool)
        return self.is_exempt(made.labels)

    @cached_property
    def _groups(self) -> list[UnitGroup]:
        read = [(entry.site.parameter_path, entry.units) for entry in self.readings]
        found = [self._group(members) for members in self.connected(read)]
        return [group for group in found if group.readers]

    def connected(self, others: Iterable[tuple[object, Tensor]]) -> list[list[object]]:
        """Return what hangs together of the sources and of some other things, by the units of these."""
        import networkx

        graph = networkx.Graph()
        for member, units in (*((source, source.units) for source in self.sources), *others):
            graph.add_edges_from((source, member) for source in self.sources_of(units).sources)
        return [list(members) for members in networkx.connected_components(graph)]

    def _group(self, members: list[object]) -> UnitGroup:
        sources = sorted((m for m in members if isinstance(m, Source)), key=lambda source: source.first)
        units = self._representatives[torch.cat([source.units for source in sources])].unique().numel()
        readings = [entry for entry in self.readings if entry.site.parameter_path in members]
        return UnitGroup(
            tuple(dict.fromkeys(source.name for source in sources if source.kind != "constant")),
            tuple(dict.fromkeys(entry.site.parameter_path for entry in readings)),
            int(units),
            all(entry.nonnegative for entry in readings),
        )


def unit_groups(graph_module: GraphModule) -> UnitGroups:
    """Find out whose activity each weight of a graph reads at each of its input channels.

    Args:
        graph_module: a captured or transformed model.

    Returns:
        The groups; printing them shows who makes the units of each and who reads them, and where groups end
        because an operation is not known (see :func:`~biofx.add_unit_rule`).

    Raises:
        InputError: it is not a graph module.

    >>> import biofx
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    >>> print(biofx.unit_groups(biofx.capture(model)))
    1 units of input_1 -> 0.weight (activity may be negative)
    4 units of 0.weight -> 3.weight
    """
    if not isinstance(graph_module, GraphModule):
        raise InputError(
            f"expected a torch.fx.GraphModule, found {type(graph_module).__name__}; capture the model first: "
            "biofx.unit_groups(biofx.capture(model))"
        )
    return _unit_groups(graph_module)


@cached_on_graph
def _unit_groups(graph_module: GraphModule) -> UnitGroups:
    observation = observation_of(graph_module)
    if observation is not None:
        return UnitGroups(observation.analysis, observation)
    return unit_groups_of_graphs(graph_module)


@cached_on_graph
def unit_groups_of_graphs(graph_module: GraphModule) -> UnitGroups:
    """Return the units as the graphs of a model alone show them, whatever was observed."""
    return UnitGroups(UnitAnalysis(whole_view(graph_module)))
