"""The modules of a tree that a graph calls, reads from, or has inlined."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from biofx.graph.graph_functions import EAGER_FORWARD, OWN_MODULE, call_own_forward, call_with_parameters
from biofx.layers import kind_of_call
from biofx.layers.sites import innermost_path
from biofx.layers.weight_site import WEIGHT_OPERATORS
from biofx.operators.norm_ops import affine_synapses, batch_norm_synapses
from biofx.operators.rate_ops import scale_gradient_by_seed
from biofx.operators.split_ops import fold_weight, spread_synapses, sum_sub_weights, sum_synapses
from biofx.plasticity.model_states import bio_module_path
from biofx.plasticity.saved_state import DRAW

_OPERATORS = WEIGHT_OPERATORS | {sum_synapses}
_ITSELF = {EAGER_FORWARD, OWN_MODULE}


@dataclass(frozen=True)
class Places:
    """Paths of modules and of their attributes."""

    inline: frozenset[str]
    """Modules whose forward is inlined in the graph; the empty path for that of the whole model."""
    passed: tuple[str, ...]
    """Those, and modules that contain what the graph calls or reads."""
    called: tuple[str, ...]
    """Modules that are called, and may be replaced."""
    read: tuple[str, ...]
    """Parameters, buffers and settings that are read."""
    operated: tuple[str, ...]
    """Those of them to which an operator is applied before they are used."""
    compact: frozenset[str]
    """Modules that are called with one value for each connection, which others may not accept."""
    repeated: frozenset[str]
    """Modules that are inlined at several places."""

    @property
    def used(self) -> Iterator[str]:
        """All of these paths."""
        return itertools.chain(self.inline, self.called, self.read)

    @classmethod
    def of(cls, graph_module: GraphModule) -> Places:
        """Return the places of a module's graph."""
        graph = graph_module.graph
        reads = [
            node
            for node in graph.nodes
            if node.op == "get_attr" and not _is_elsewhere(graph_module, str(node.target))
        ]
        modules = [node for node in reads if module_at(graph_module, str(node.target)) is not None]
        asked = {node: [user for user in node.users if user.target is getattr] for node in modules}
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        called |= {str(node.target) for node in modules if len(asked[node]) < len(node.users)}
        read = {str(node.target) for node in reads} - {str(node.target) for node in modules}
        read |= {f"{node.target}.{user.args[1]}" for node in modules for user in asked[node]}
        read |= set(_draws(graph))
        stacks = [node.meta.get("nn_module_stack") or {} for node in graph.nodes]
        entries = {(str(key), str(place)) for stack in stacks for key, (place, _) in stack.items()}
        times = Counter(place for _, place in entries)
        functions = {innermost_path(node) for node in graph.nodes if _is_lowered(node)}
        inline = set(times) - (called - functions) - {""}
        owners = {path.rpartition(".")[0] for path in read}
        passed = inline | {above for path in inline | called | owners for above in _above(path)}
        if not any(node.target in (call_own_forward, call_with_parameters) for node in graph.nodes):
            inline.add("")
        operated = {
            str(node.target)
            for node in reads
            if any(user.target in _OPERATORS and node in _operands(user) for user in node.users)
        }
        compact = frozenset(str(node.target) for node in compact_calls(graph))
        return cls(
            inline=frozenset(inline),
            passed=("", *sorted((passed | compact) - {""})),
            called=tuple(sorted(called - {""})),
            read=tuple(sorted(read)),
            operated=tuple(sorted(operated)),
            compact=compact,
            repeated=frozenset(path for path in inline if times[path] > 1),
        )


def compact_calls(graph: Graph) -> list[Node]:
    """Return the calls of modules in a folded graph that may be given one value for each connection."""
    compact: set[Node] = set()
    for node in graph.nodes:
        if node.target in _ENDS:
            continue
        folds = [source for source in node.all_input_nodes if source.target is fold_weight]
        if folds:
            begins = any(source.kwargs.get("rows", 1) != 1 for source in folds)
        else:
            begins = node.target is sum_synapses or any(source in compact for source in node.all_input_nodes)
        if begins:
            compact.add(node)
    return [node for node in compact if node.op == "call_module"]


_ENDS: frozenset[Any] = frozenset({fold_weight, spread_synapses, affine_synapses, batch_norm_synapses})


def _is_elsewhere(root: nn.Module, path: str) -> bool:
    """Whether a path leads to the module itself, or through an object that is no module."""
    if path in _ITSELF:
        return True
    module: nn.Module | None = root
    for part in path.split(".")[:-1]:
        if module is not None and part not in _inside(module) and part in vars(module):
            return True
        module = None if module is None else _inside(module).get(part)
    return False


def _inside(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the modules that a module holds; none while it is being copied, and only its name is there."""
    found: dict[str, nn.Module | None] = vars(module).get("_modules", {})
    return found


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, None if there is none."""
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = None if module is None else _inside(module).get(part)
    return module


def held_at(root: nn.Module, path: str) -> Any:
    """Return the module or the parameter at a path, None if there is none."""
    owner = module_at(root, path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    return None if owner is None else owner._modules.get(name, owner._parameters.get(name))


def _is_lowered(node: Node) -> bool:
    """Whether a node is a layer's function; other calls of the layer may be calls of the module."""
    return node.op == "call_function" and kind_of_call(node) is not None


def _draws(graph: Graph) -> Iterator[str]:
    """Yield the paths of the seeds from which the graph draws factors."""
    for scaling in graph.find_nodes(op="call_function", target=scale_gradient_by_seed):
        source = scaling.args[0]
        while isinstance(source, Node) and source.op == "call_function" and source.args:
            source = source.args[0]
        path, named = str(getattr(source, "target", "")), str(scaling.kwargs["path"])
        if f".{named}".endswith(f".{path}"):  # else it is another name of the parameter
            yield f"{bio_module_path(path)}.{DRAW}"


def _operands(operator: Node) -> tuple[Any, ...]:
    """Return the weights that an operator is applied to."""
    return operator.args if operator.target is sum_sub_weights else operator.args[:1]


def _above(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))
