"""How nodes with weights follow each other: which face the model's inputs, which lead to its outputs alone.

Of a model with regions the graphs do not say that; observed runs do.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch.fx import GraphModule, Node

from biofx.analysis.observation import observation_of
from biofx.analysis.synapses import synaptic_nodes
from biofx.graph.analysis_cache import cached_on_graph
from biofx.graph.node_kinds import changed_in_place, queries_metadata
from biofx.graph.regions import region_of_nodes, region_output


@cached_on_graph
def readout_nodes(graph_module: GraphModule) -> Set[Node]:
    """Return the synaptic nodes with no other synaptic node between them and an output of the model.

    Where what follows a region is not known, its output counts as one.
    """
    synaptic = synaptic_nodes(graph_module)
    readout: set[Node] = set()
    open_nodes: set[Node] = set()
    for node in reversed(graph_module.graph.nodes):
        writes = any(changed in open_nodes for changed in changed_in_place(node))
        ends = node.op == "output" or node.target is region_output
        if queries_metadata(node):
            continue
        if ends or node in open_nodes or writes:
            if node in synaptic:
                readout.add(node)
            else:
                open_nodes.update(node.all_input_nodes)
    observation = observation_of(graph_module)
    if observation is None:
        return readout
    return (readout - observation.known) | observation.ever(readout_nodes(observation.view))


@cached_on_graph
def readouts_in_doubt(graph_module: GraphModule) -> Mapping[Node, str]:
    """Return those of the readout nodes of which it is not known what follows, and the region of each."""
    regions, observation = region_of_nodes(graph_module.graph), observation_of(graph_module)
    known: Set[Node] = frozenset() if observation is None else observation.known
    return {
        node: regions[node] for node in readout_nodes(graph_module) if node in regions and node not in known
    }


@cached_on_graph
def input_facing_nodes(graph_module: GraphModule) -> Set[Node]:
    """Return the synaptic nodes that no other synaptic node feeds: their presynaptic units are inputs.

    Where what goes into a region is not known, its inputs count as the model's.
    """
    synaptic = synaptic_nodes(graph_module)
    fed: set[Node] = set()
    for node in graph_module.graph.nodes:
        if any(source in synaptic or source in fed for source in node.all_input_nodes):
            fed.add(node)
            fed.update(changed_in_place(node))
    observation = observation_of(graph_module)
    if observation is None:
        return synaptic - fed
    return (synaptic - fed - observation.known) | observation.always(input_facing_nodes(observation.view))


@cached_on_graph
def last_synapses(graph_module: GraphModule) -> Mapping[Node, str | None]:
    """Return the synaptic nodes that lead to no other, and the region each lies in.

    Inside a region what follows may not be known; None where nothing does, as far as anything is known.
    """
    synaptic, regions = synaptic_nodes(graph_module), region_of_nodes(graph_module.graph)
    leads_on: set[Node] = set()
    read_later: set[Node] = set()
    for node in reversed(graph_module.graph.nodes):
        if node in read_later or any(changed in read_later for changed in changed_in_place(node)):
            leads_on.add(node)
        if (node in synaptic or node in leads_on) and not queries_metadata(node):
            read_later.update(node.all_input_nodes)
    last = {node: regions.get(node) for node in synaptic - leads_on}
    observation = observation_of(graph_module)
    if observation is None:
        return last
    unknown = {node: region for node, region in last.items() if node not in observation.known}
    return unknown | dict.fromkeys(observation.always(last_synapses(observation.view)))
