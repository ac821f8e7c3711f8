"""The regions of a model that has more than one graph, and which of them uses which weight.

Where Python stays in charge of a module (it decides by a value, keeps a cache, works under a context), there
is a graph break: the module runs its eager forward, and what it calls is captured below it. Each such
*region* is a graph module of its own in the place of the module. :mod:`biofx.graph.joined_graph` shows a
model and its regions as one graph. No edge leads from one region to another in that graph: which region feeds
which is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import has_side_effect

from biofx.errors import PassError
from biofx.graph.modules_by_path import modules_by_path

GRAPH_BREAKS = "graph_breaks"
"""Attribute of a captured model that holds the paths of the modules that run in Python, and why."""
JOINED = "_joined"
"""Attribute that a model has while its graph holds those of its regions."""
OBSERVED = "_observed"
"""Attribute of a view of a model whose graph is a run that was observed, and has no regions."""
ELSEWHERE = "_biofx_elsewhere"
"""Attribute of a region that holds modules outside of it from which its graph reads, by names of its own.

Such are the signs of the previous layer where a layer became a region because an adapter was put around it.
"""


@has_side_effect
def begin_region(path: str) -> None:
    """Mark where, in a joined graph, the region of the module at ``path`` begins."""


@has_side_effect
def region_input(path: str, name: str, *default: object) -> None:
    """Represent, in a joined graph, an argument that Python passes to a region.

    Raises:
        PassError: always; a joined graph is for rewriting, not for running.
    """
    raise PassError(f"the graph of region {path!r} runs when its module is called, not as part of another")


@has_side_effect
def region_output(path: str, value: object) -> None:
    """Mark where, in a joined graph, a region ends, and what it returns."""


def is_joined(graph_module: nn.Module) -> bool:
    """Whether a model's graph holds those of its regions at present, or is a run that was observed."""
    return JOINED in vars(graph_module) or OBSERVED in vars(graph_module)


def region_paths(graph_module: nn.Module) -> tuple[str, ...]:
    """Return the paths of a model's regions, at present: adapters may have been put around some of them."""
    if OBSERVED in vars(graph_module):
        return ()
    found: tuple[str, ...] = vars(graph_module).get("region_paths", ())
    modules = dict(graph_module.named_modules())
    late = [p for p, module in modules.items() if p and ELSEWHERE in vars(module) and p not in found]
    moved = {
        path
        for path in found
        if not isinstance(modules.get(path), GraphModule) and any(p.startswith(f"{path}.") for p in late)
    }
    return (*(path for path in found if path not in moved), *late)


def graph_breaks_of(graph_module: nn.Module) -> Mapping[str, str]:
    """Return the paths of the modules that run their eager forward in Python, and why."""
    found: Mapping[str, str] = vars(graph_module).get(GRAPH_BREAKS, {})
    return {} if OBSERVED in vars(graph_module) else found


def regions_read_by_python(graph_module: nn.Module) -> Mapping[str, str]:
    """Return the paths of regions whose weights Python may use without calling them, and why."""
    found: Mapping[str, str] = vars(graph_module).get("read_by_python", {})
    return found


def parameters_read_by(graph_module: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """Return the names of the parameters that eager forwards are given as expressions, by their paths."""
    found: Mapping[str, tuple[str, ...]] = vars(graph_module).get("parameters_read", {})
    return found


def region_of_nodes(graph: Graph) -> dict[Node, str]:
    """Return, for each node of a joined graph that lies in a region, the path of the region."""
    regions: dict[Node, str] = {}
    current: str | None = None
    for node in graph.nodes:
        if node.target is begin_region:
            current = str(node.args[0])
        if current is not None:
            regions[node] = current
        if node.target is region_output:
            current = None
    return regions


def region_around(node: Node) -> str | None:
    """Return the path of the region of a joined graph in which a node lies, None if it lies in none."""
    current = node
    while current.op != "root":
        if current.target is begin_region:
            return str(current.args[0])
        current = current.prev
        if current.target is region_output:
            break
    return None


def _owners(names: Iterable[str]) -> set[str]:
    """Return the paths of the modules that hold parameters, among them the module from which they lead."""
    return {"", *(name.rpartition(".")[0] for name in names)}


def is_inside(path: str, module: str) -> bool:
    """Whether a path leads to a module, or to something that a module at or below it holds."""
    return not module or path == module or path.startswith(f"{module}.")


def joined_path(outer: str, inner: str) -> str:
    """Return the path of something inside a module, in the model that holds it; either may be empty."""
    return ".".join(part for part in (outer, inner) if part)


def innermost_around(path: str, modules: Iterable[str]) -> str | None:
    """Return the innermost of some modules that holds what is at a path, None if none does."""
    return max((module for module in modules if is_inside(path, module)), key=len, default=None)


class RegionUse:
    """Which region of a joined graph uses which weight; in a model of one graph there is none.

    Args:
        graph_module: the model.
        graph: its graph, joined with those of its regions.
    """

    def __init__(self, graph_module: GraphModule, graph: Graph) -> None:
        self._modules = modules_by_path(graph_module)
        paths = region_paths(graph_module)
        read = parameters_read_by(graph_module)
        self._regions = {id(self._modules[path]): path for path in paths}
        self._in_python = {id(self._modules[path]) for path in graph_breaks_of(graph_module)}
        self._held_by = {
            path: {id(self._modules[joined_path(path, inner)]) for inner in _owners(read.get(path, ()))}
            if id(self._modules[path]) in self._in_python
            else {id(inner) for inner in self._modules[path].modules()}
            for path in paths
        }
        self._region_of = region_of_nodes(graph) if paths else {}
        self._read_by_python = regions_read_by_python(graph_module)
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
        """Whether a node calls a module that runs its eager forward, or has a graph of its own."""
        return self.is_call_of_a_region(node) or (
            node.op == "call_module" and id(self._modules[str(node.target)]) in self._in_python
        )

    def is_apart(self, parameter: nn.Parameter) -> bool:
        """Whether one region holds a parameter, and nothing outside that region does."""
        owners = set(self._owners.get(id(parameter), ()))
        return any(owners <= held for held in self._held_by.values())

    def path_for(self, node: Node, own: str, first: str) -> str:
        """Return the path by which a node may read a parameter: the first, if its region holds that."""
        return first if is_inside(first, self._region_of.get(node, "")) else own

    def obstacle(self, node: Node, parameter: nn.Parameter) -> str | None:
        """Return why a weight cannot be rewritten in the graph of a node alone, None if it can."""
        region = self._region_of.get(node)
        if region is not None and region in self._read_by_python:
            return self._read_by_python[region]
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
