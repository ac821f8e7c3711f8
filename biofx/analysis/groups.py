"""What the analysis found, in the terms of a user: groups of units, who makes them and who reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from biofx.analysis.analysis import Analysis, Reading, Source
from biofx.analysis.dataflow import synaptic_nodes
from biofx.analysis.flow import Flow
from biofx.analysis.reach import only_compared
from biofx.errors import InputError
from biofx.graph.joined_graph import whole_view
from biofx.layers.weight_site import WeightSite

_PREFERRED = ("layer", "open", "input", "nobody")
"""Which kind of source a unit is counted to, of those that are one in it."""


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


@dataclass(frozen=True)
class Home:
    """Where units are counted to: for each, the source and the place in it."""

    sources: list[Source]
    """In execution order, each once."""
    index: Tensor
    """For each unit its place in the sources laid one after another, int64."""

    @property
    def is_whole(self) -> bool:
        """Whether the units are all those of the sources, in order."""
        count = sum(source.count for source in self.sources)
        return torch.equal(self.index, torch.arange(count))


class UnitGroups:
    """The presynaptic units of every weight of a graph; iterating gives the groups."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._roots = analysis.roots()
        self._homes = self._find_homes()
        self._starts = torch.tensor([source.first for source in analysis.sources])
        self._compared_only = only_compared(
            analysis.graph_module.graph, analysis.comparisons, synaptic_nodes(analysis.graph_module)
        )

    @property
    def readings(self) -> list[Reading]:
        """What each weight reads, in execution order."""
        return self._analysis.readings

    @property
    def norms(self) -> dict[Node, Tensor]:
        """The units that each normalisation acts on; those that act on none that are known are left out."""
        return {
            node: flow.layout.labels for node, flow in self._analysis.norms.items() if flow.layout is not None
        }

    @cached_property
    def ends(self) -> dict[Node, str]:
        """Where groups end, and why."""
        return dict(self._analysis.ended)

    @cached_property
    def handed(self) -> dict[str, str]:
        """Names of nodes that depend on no weight but on what Python hands to a region, and that region."""
        return {node.name: region for node, region in self._analysis.handed.items()}

    def region_that_feeds(self, reading: Reading) -> str | None:
        """Return the region by whose inputs alone a weight is fed as far as is known, None if others do."""
        sources = self.home(reading.units).sources
        regions = [self.handed.get(source.name) for source in sources if source.kind == "open"]
        known = any(source.kind == "layer" for source in sources)
        return None if known or None in regions else next(iter(regions), None)

    def reading(self, site: WeightSite) -> Reading:
        """Return what a site reads."""
        return self._by_use[site.node, site.parameter_path]

    @cached_property
    def _by_use(self) -> dict[tuple[Node, str], Reading]:
        return {(entry.site.node, entry.site.parameter_path): entry for entry in self.readings}

    def home(self, units: Tensor) -> Home:
        """Return where units are counted to."""
        homes = self._homes[self._roots[units]]
        sources = torch.bucketize(homes, self._starts, right=True) - 1
        order = sorted(set(sources.tolist()))
        found = [self._analysis.sources[number] for number in order]
        offsets = torch.zeros(len(self._starts), dtype=torch.int64)
        before = 0
        for number, source in zip(order, found, strict=True):
            offsets[number] = before - source.first
            before += source.count
        return Home(found, homes + offsets[sources])

    @property
    def flows(self) -> dict[Node, Flow]:
        """What is known of each node's value."""
        return self._analysis.flows

    @property
    def sources(self) -> list[Source]:
        """Where units begin, in execution order."""
        return self._analysis.sources

    @property
    def count(self) -> int:
        """How many numbers for units there are; units that are one have several."""
        return len(self._roots)

    def producers(self) -> list[str]:
        """Return the paths of the weights that make units, in execution order."""
        return list(self._analysis.produced)

    def made_by(self, path: str) -> Tensor:
        """Return the units that a weight makes, one for each output, int64."""
        return self._analysis.produced[path].labels

    def home_units(self, units: Tensor) -> Tensor:
        """Return the units that given ones are counted to."""
        return self._homes[self._roots[units]]

    def is_exempt(self, units: Tensor) -> Tensor:
        """Return whether units are only compared with each other, bool."""
        return self._is_exempt[self._roots[units]]

    def exempt_rows(self, site: WeightSite) -> Tensor:
        """Return which outputs of a site are only compared with each other, bool, ``(output channels,)``.

        Queries and keys decide where attention goes; nothing of theirs is passed on to another unit.
        """
        rows = site.parameter.shape[1 if site.kind.transposed else 0]
        if site.role in ("query", "key") or (site.node in self._compared_only and not site.kind.is_compound):
            return torch.ones(rows, dtype=torch.bool)
        made = self._analysis.produced.get(site.parameter_path)
        if made is None or len(made.labels) != rows:
            return torch.zeros(rows, dtype=torch.bool)
        return self.is_exempt(made.labels)

    @cached_property
    def _is_exempt(self) -> Tensor:
        exempt = torch.zeros(len(self._roots), dtype=torch.bool)
        exempt[self._roots[self._analysis.compared()]] = True
        for reading in self.readings:
            exempt[self._roots[reading.units]] = False
        return exempt

    def _find_homes(self) -> Tensor:
        """Return for each root the unit it is counted to: the first one that a layer makes, if any."""
        sources, roots = self._analysis.sources, self._roots
        ranks = [_PREFERRED.index(source.kind) for source in sources]
        counts = torch.tensor([source.count for source in sources], dtype=torch.int64)
        worth = torch.tensor(ranks, dtype=torch.int64).repeat_interleave(counts)
        numbers = worth * len(roots) + torch.arange(len(roots))
        best = numbers.clone().scatter_reduce(0, roots, numbers, "amin")
        return best % max(1, len(roots))

    def __iter__(self) -> Iterator[UnitGroup]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    @cached_property
    def _groups(self) -> list[UnitGroup]:
        graph: nx.Graph = nx.Graph()
        for source in self._analysis.sources:
            for home in self.home(torch.arange(source.first, source.first + source.count)).sources:
                graph.add_edge(source, home)
        for reading in self.readings:
            for source in self.home(reading.units).sources:
                graph.add_edge(source, reading.site.parameter_path)
        groups = []
        for members in nx.connected_components(graph):
            sources = sorted((m for m in members if isinstance(m, Source)), key=lambda source: source.first)
            paths = [entry.site.parameter_path for entry in self.readings]
            readers = tuple(dict.fromkeys(path for path in paths if path in members))
            if readers:
                groups.append(self._group(sources, readers))
        return groups

    def _group(self, sources: list[Source], readers: tuple[str, ...]) -> UnitGroup:
        numbers = torch.cat([torch.arange(entry.first, entry.first + entry.count) for entry in sources])
        units = int(self._roots[numbers].unique().numel())
        wanted = set(readers)
        nonnegative = all(entry.nonnegative for entry in self.readings if entry.site.parameter_path in wanted)
        names = tuple(dict.fromkeys(source.name for source in sources if source.kind != "nobody"))
        return UnitGroup(names, readers, units, nonnegative)

    def __str__(self) -> str:
        lines = [str(group) for group in self._groups]
        lines += [f"ends at {node.name}: {reason}" for node, reason in self.ends.items()]
        return "\n".join(lines)


def unit_groups(graph_module: GraphModule) -> UnitGroups:
    """Find out whose activity each weight of a graph reads at each of its input channels.

    Args:
        graph_module: a captured or transformed model.

    Returns:
        The groups; printing them shows who makes the units of each and who reads them, and where groups end
        because an operation is not known (see :func:`add_unit_rule`).

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
    return UnitGroups(Analysis.of(whole_view(graph_module)))
