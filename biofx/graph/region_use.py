"""Which region of a model uses which weight, and what no region can know of the others."""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, GraphModule, Node

from biofx.graph.regions import (
    is_inside,
    kept_modules,
    reasons_against_regions,
    region_of_nodes,
    region_paths,
)


class RegionUse:
    """Answers for one joined graph; for a model of one graph every answer is that nothing is in the way."""

    def __init__(self, graph_module: GraphModule, graph: Graph) -> None:
        self._modules = dict(graph_module.named_modules(remove_duplicate=False))
        paths = region_paths(graph_module)
        self._regions = {id(self._modules[path]): path for path in paths}
        self._kept = {id(self._modules[path]) for path in kept_modules(graph_module)}
        self._held_by = {
            path: {id(self._modules[path])}
            if id(self._modules[path]) in self._kept
            else {id(inner) for inner in self._modules[path].modules()}
            for path in paths
        }
        self._region_of = region_of_nodes(graph) if paths else {}
        self._feared = reasons_against_regions(graph_module)
        self._owners: dict[int, dict[int, str]] = {}
        self._users: dict[int, set[str]] = {}
        if paths:
            self._note_owners()
            for node in graph.nodes:
                self._note_use(node)

    def is_call_of_a_region(self, node: Node) -> bool:
        """Whether a node calls, from elsewhere, a module that has a graph of its own."""
        if not self._regions or node.op != "call_module":
            return False
        region = self._regions.get(id(self._modules[str(node.target)]))
        return region is not None and self._region_of.get(node) != region

    def is_run_by_python(self, node: Node) -> bool:
        """Whether a node calls a module whose own forward, or whose own graph, is not part of this graph."""
        return self.is_call_of_a_region(node) or (
            node.op == "call_module" and id(self._modules[str(node.target)]) in self._kept
        )

    def is_apart(self, parameter: nn.Parameter) -> bool:
        """Whether one region holds a parameter, and nothing outside that region does."""
        owners = set(self._owners.get(id(parameter), ()))
        return any(owners <= held for held in self._held_by.values())

    def path_for(self, node: Node, own: str, first: str) -> str:
        """Return by which of its paths a node may read a parameter: the first, if its region holds that."""
        return first if is_inside(first, self._region_of.get(node, "")) else own

    def obstacle(self, node: Node, parameter: nn.Parameter) -> str | None:
        """Return why a weight is not the business of the graph that uses it alone."""
        region = self._region_of.get(node)
        if region is not None and region in self._feared:
            return self._feared[region]
        owners = self._owners.get(id(parameter), {})
        beyond = [path for owner, path in owners.items() if region and owner not in self._held_by[region]]
        if beyond:
            return f"its weight is tied to that of {beyond[0]!r}, outside the region of {region!r}"
        for user in self._users.get(id(parameter), set()) - {region or ""}:
            return f"its weight is also used in {f'the region of {user!r}' if user else 'the main graph'}"
        return None

    def _note_owners(self) -> None:
        for path, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), {}).setdefault(id(module), path)

    def _note_use(self, node: Node) -> None:
        used: list[nn.Parameter] = []
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            held = self._modules[path]._parameters.get(name) if path in self._modules else None
            used = [] if held is None else [held]
        elif node.op == "call_module" and not self.is_run_by_python(node):
            used = list(self._modules[str(node.target)].parameters())
        for parameter in used:
            self._users.setdefault(id(parameter), set()).add(self._region_of.get(node, ""))
