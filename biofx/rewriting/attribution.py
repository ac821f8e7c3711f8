"""Which candidate of a pass each changed node belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch.fx import GraphModule, Node

from biofx.graph.changes import Change
from biofx.rewriting.report import Remark


def attributed(changes: list[Change], graph_module: GraphModule, remarks: list[Remark]) -> list[Change]:
    """Say of each change which candidate it belongs to: what follows from it, then what leads up to it."""
    because = {
        name: name for remark in remarks if remark.kind == "applied" and (name := remark.node) is not None
    }
    created = {change.node for change in changes if change.kind == "created"}
    touched = {change.node for change in changes}
    new_nodes = [node for node in graph_module.graph.nodes if node.name in created]
    for node in new_nodes:
        _inherit(node, because, node.all_input_nodes)
    for node in reversed(new_nodes):
        _inherit(node, because, node.users)
    for node in graph_module.graph.nodes:
        if node.name in touched:
            _inherit(node, because, (source for source in node.all_input_nodes if source.name in created))
    for node in graph_module.graph.nodes:  # what reads a rewritten candidate now, and what follows from that
        if node.name in touched:
            _inherit(node, because, node.all_input_nodes)
    for node in reversed(new_nodes):
        _inherit(node, because, node.users)
    for node in graph_module.graph.nodes:  # what a rewrite lets through may need a change further on
        _inherit(node, because, node.all_input_nodes)
    return [dataclasses.replace(change, because=because.get(change.node)) for change in changes]


def _inherit(node: Node, because: dict[str, str], neighbours: Iterable[Node]) -> None:
    if node.name not in because:
        origin = next((because[near.name] for near in neighbours if near.name in because), None)
        if origin is not None:
            because[node.name] = origin
