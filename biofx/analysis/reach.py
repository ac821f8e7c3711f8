"""Where what a node gives out ends up: only in comparisons, or only in the model's output."""

from __future__ import annotations

from collections.abc import Mapping, Set

from torch.fx import Graph, Node

from biofx.graph.node_kinds import queries_metadata
from biofx.graph.regions import region_of_nodes


def only_compared(graph: Graph, comparisons: Mapping[Node, Set[Node]], synaptic: Set[Node]) -> set[Node]:
    """Return the nodes whose every way on leads into a comparison before it meets another weight.

    Args:
        graph: the graph.
        comparisons: operations that compare values, and the values they compare.
        synaptic: the nodes with weights.
    """
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        users = [user for user in node.users if not queries_metadata(user)]
        if users and all(
            node in comparisons.get(user, ()) or (user in found and user not in synaptic) for user in users
        ):
            found.add(node)
    return found


def last_synapses(graph: Graph, synaptic: Set[Node]) -> set[Node]:
    """Return the nodes with weights from which no other such node can be reached, outside of regions."""
    return _last(graph, synaptic) - region_of_nodes(graph).keys()


def last_in_regions(graph: Graph, synaptic: Set[Node]) -> dict[Node, str]:
    """Return the same inside of regions, where what follows is not known, with the paths of the regions."""
    regions = region_of_nodes(graph)
    return {node: regions[node] for node in _last(graph, synaptic) if node in regions}


def _last(graph: Graph, synaptic: Set[Node]) -> set[Node]:
    leads_on: set[Node] = set()
    for node in reversed(graph.nodes):
        followers = [user for user in node.users if not queries_metadata(user)]
        if any(user in synaptic or user in leads_on for user in followers):
            leads_on.add(node)
    return set(synaptic - leads_on)
