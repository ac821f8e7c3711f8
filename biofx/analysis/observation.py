"""What observed runs say of a model with regions: its units, and which of its nodes an observed node is.

The first run is analysed, and the second, of other sizes, is compared with it weight by weight. What the two
do not agree on is not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from biofx.analysis.connected_units import comparable
from biofx.analysis.observed_units import ObservedUnitAnalysis
from biofx.graph.analysis_cache import cached_on_graph
from biofx.graph.printing import function_name
from biofx.graph.regions import region_of_nodes
from biofx.layers.computed_weight import SignFate
from biofx.layers.norms import NormSite, find_norms
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import READ, Sites, Weight, WeightSite
from biofx.model.observed_runs import observed_runs_of, observed_view
from biofx.operators.split_ops import fold_weight, pool_synapses
from biofx.plasticity.model_states import expanded_weights

GIVE_EXAMPLES = "give example_inputs to have signs here"
NOT_OBSERVED = "the example inputs do not lead to it"
DISAGREES = "whose units it reads differs between the example inputs and a run of other sizes"


@dataclass(frozen=True)
class Observation:
    """What is known of a model from its observed runs."""

    analysis: ObservedUnitAnalysis
    """Of the first run."""
    nodes: Mapping[Node, tuple[Node, ...]]
    """The nodes of the model's graph that an observed node is a call of."""
    disputed: frozenset[Hashable]
    """The keys of the weights on which the two runs do not agree (:func:`weight_key`)."""
    order: Mapping[Hashable, int]
    """When each weight was first used, by its key."""
    in_python: frozenset[Hashable]
    """The keys of the weights that eager forwards use without calling a layer."""
    is_traced: bool
    """Whether nothing ran, since there was no example: what the trace cannot say is not known."""

    @property
    def view(self) -> GraphModule:
        """The model, with the first run as its graph."""
        return self.analysis.graph_module

    @cached_property
    def known(self) -> Set[Node]:
        """The nodes of the model's graph of which a call was observed."""
        return {node for nodes in self.nodes.values() for node in nodes}

    def by_node(self, observed: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
        """Return what is known of observed nodes by the nodes of the model's graph."""
        return {node: found for call, found in observed.items() for node in self.nodes.get(call, ())}

    def always(self, observed: Iterable[Node]) -> set[Node]:
        """Return the nodes of the model's graph all of whose calls are among some observed nodes."""
        return self._with(observed, all)

    def ever(self, observed: Iterable[Node]) -> set[Node]:
        """Return the nodes of the model's graph one of whose calls is among some observed nodes."""
        return self._with(observed, any)

    def _with(self, observed: Iterable[Node], which: Callable[[list[bool]], bool]) -> set[Node]:
        wanted = set(observed)
        calls: dict[Node, list[bool]] = {}
        for call, nodes in self.nodes.items():
            for node in nodes:
                calls.setdefault(node, []).append(call in wanted)
        return {node for node, found in calls.items() if which(found)}


def weight_key(site: WeightSite) -> Hashable:
    """Return what tells a weight from others in every graph of a model."""
    return (
        site.parameter_path if site.is_computed else id(site.parameter if site.first is None else site.first)
    )


@cached_on_graph
def observation_of(graph_module: GraphModule) -> Observation | None:
    """Return what observed runs say of a model; None where its graph says it all, or no run was observed."""
    runs = observed_runs_of(graph_module).graphs
    if not runs or expanded_weights(graph_module):  # which were seen at another size
        return None
    analyses = [_analysed(graph_module, observed_view(graph_module, graph)) for graph in runs]
    first = analyses[0]
    own = _nodes_by_key(graph_module)
    view = first.graph_module
    sites = find_sites(view).found
    nodes: dict[Node, tuple[Node, ...]] = {}
    for site in sites:
        nodes[site.node] = (*nodes.get(site.node, ()), *own.get(weight_key(site), ()))
    for norm in find_norms(view):
        nodes.setdefault(norm.node, own.get(_gain_key(norm), ()))
    keys = list(dict.fromkeys(map(weight_key, sites)))
    order = {key: place for place, key in enumerate(keys)}
    disputed = frozenset(_disputed(analyses))
    in_python = frozenset(map(weight_key, find_sites(graph_module).reads))
    is_traced = observed_runs_of(graph_module).is_traced
    return Observation(first, nodes, disputed, order, in_python, is_traced)


@dataclass(frozen=True)
class OrderOfExecution:
    """Where weights stand in the order of execution."""

    regions: Mapping[Node, str]
    """The regions in which nodes lie: the graph does not say when Python calls them."""
    depths: Mapping[Hashable, float]
    """Places of observed weights by their keys, 0 for the first and 1 for the last."""

    @classmethod
    def of(cls, graph_module: GraphModule) -> OrderOfExecution:
        """Return the order in a graph, with what was observed of it."""
        observation = observation_of(graph_module)
        order = {} if observation is None else observation.order
        last = max(1, len(order) - 1)
        depths = {key: place / last for key, place in order.items()}
        return cls(region_of_nodes(graph_module.graph), depths)

    def region_of_unknown(self, site: WeightSite) -> str | None:
        """Return the region of a site whose place is not known, None if it is."""
        return None if weight_key(site) in self.depths else self.regions.get(site.node)

    def placed(self, weight: Weight) -> Weight:
        """Return a weight with the place at which it was observed."""
        return dataclasses.replace(weight, depth=self.depths.get(weight_key(weight.sites[0]), weight.depth))


def find_all_sites(graph_module: GraphModule) -> Sites:
    """Return the sites of a graph, with what Python uses as the weight of a layer as a site of such a layer.

    Those stay among :attr:`~biofx.layers.weight_site.Sites.reads`; what is known of their layer comes from an
    observed run. :func:`weights_in_python` returns them alone.
    """
    sites = find_sites(graph_module)
    observation = observation_of(graph_module)
    if observation is None:
        return sites
    uses: dict[Hashable, list[WeightSite]] = {}
    for site in find_sites(observation.view).found:
        uses.setdefault(weight_key(site), []).append(site)
    return dataclasses.replace(
        sites, reads=[_as_layer(read, uses.get(weight_key(read), [])) for read in sites.reads]
    )


def weights_in_python(sites: Sites) -> list[WeightSite]:
    """Return the reads that are known to be the weight of a layer."""
    return [read for read in sites.reads if read.kind is not READ]


def _why_no_sign_in_python(site: WeightSite) -> str | None:
    """Return why a parameter that Python computes a weight from can have no sign, None if it can."""
    if site.computation is None or site.computation.keeps_signs:
        return None
    if site.value_blocker is not None:
        return site.value_blocker
    names = ", ".join(dict.fromkeys(function_name(node.target) for node in site.computation.nodes))
    reason = f"Python computes its weight by {names}, behind which no sign of a parameter is left"
    never_negative = site.computation.fate is SignFate.LOST
    if not never_negative:
        return reason
    return (
        f"{reason}; the units that it reads are excitatory, or inhibitory where what it drives is subtracted"
    )


def _as_layer(read: WeightSite, uses: list[WeightSite]) -> WeightSite:
    """Return a read as a site of the layer that Python uses it in, as it is where Python uses it in none."""
    if not uses:
        return read
    used_as = {(use.kind, use.groups, use.role) for use in uses}
    reasons = [reason for use in uses if (reason := _why_no_sign_in_python(use)) is not None]
    if len(used_as) > 1:
        reasons.append("it is the weight of layers of several kinds, whose presynaptic units differ")
    kind, groups, role = uses[0].kind, uses[0].groups, uses[0].role
    slot = dataclasses.replace(read.slot, role=role)
    against = next(iter(reasons), None) if read.value_blocker is None else read.value_blocker
    return dataclasses.replace(read, kind=kind, groups=groups, slot=slot, value_blocker=against)


def _analysed(graph_module: GraphModule, view: GraphModule) -> ObservedUnitAnalysis:
    """Return the units of an observed run; those that the model sums by now are one."""
    analysis = ObservedUnitAnalysis(view)
    for path, gamma in _summed_rows(graph_module).items():
        layout = analysis.produced.get(path)
        if layout is not None and len(layout.labels) % gamma == 0:
            table = layout.labels.reshape(-1, gamma)
            analysis.join(table[:, :1].expand_as(table), table)
    return analysis


def _summed_rows(graph_module: GraphModule) -> dict[str, int]:
    """Return how many neighbouring outputs of a weight are summed, by its path."""
    found: dict[str, int] = {}
    for site in find_sites(graph_module).found:
        after = [user for user in _behind(site.node) if user.target is pool_synapses]
        for pool in after:
            found[site.parameter_path] = int(pool.kwargs["gamma"])  # type: ignore[arg-type]
        for operator in site.operators:
            if operator.target is fold_weight and operator.kwargs.get("rows", 1) != 1:
                found[site.parameter_path] = int(operator.kwargs["rows"])  # type: ignore[arg-type]
    return found


def _behind(node: Node) -> list[Node]:
    """Return the nodes that read a node, directly or through one activation."""
    return [*node.users, *(user for reader in node.users for user in reader.users)]


def _nodes_by_key(graph_module: GraphModule) -> dict[Hashable, tuple[Node, ...]]:
    found: dict[Hashable, tuple[Node, ...]] = {}
    sites = find_sites(graph_module)
    for site in (*sites.found, *sites.reads):
        key = weight_key(site)
        found[key] = tuple(dict.fromkeys((*found.get(key, ()), site.node)))
    for norm in find_norms(graph_module):
        key = _gain_key(norm)
        found[key] = (*found.get(key, ()), norm.node)
    return found


def _gain_key(norm: NormSite) -> Hashable:
    return "gain", id(norm.parameter)


def _disputed(analyses: list[ObservedUnitAnalysis]) -> set[Hashable]:
    """Return the weights whose units are not the same in all runs."""
    seen: list[dict[Hashable, Tensor]] = []
    for analysis in analyses:
        numbers = comparable(analysis)
        seen.append({weight_key(reading.site): numbers[reading.units] for reading in analysis.readings})
    return {
        key
        for key in set().union(*seen)
        if any(
            key not in entry or not torch.equal(entry[key], seen[0].get(key, entry[key])) for entry in seen
        )
    }
