"""Normalisation layers: where their weights are, and how to make them visible.

Their weights (gamma) scale units and are no synapses, so no pass takes them for weight sites.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from biofx.errors import PassError
from biofx.graph.joined_graph import whole_graph
from biofx.graph.regions import RegionUse
from biofx.layers.lowering import Lowering
from biofx.layers.obstacles import computed, hooks_of
from biofx.layers.sites import times_read
from biofx.layers.weight_site import parameter_behind
from biofx.layers.weight_slots import WeightSlot
from biofx.operators.norm_ops import batch_norm, instance_norm

_SLOT_OF_FUNCTION: dict[Any, WeightSlot] = {
    function: WeightSlot(role="gain", argument=(place, "weight"))
    for function, place in (
        *((batch_norm, 1), (instance_norm, 1), (F.layer_norm, 2), (F.rms_norm, 2), (F.group_norm, 2)),
        *((F.batch_norm, 3), (F.instance_norm, 3)),
    )
}


@dataclass(frozen=True)
class NormSite:
    """One use of the weight of a normalisation."""

    node: Node
    """The node that computes the normalisation's output."""
    parameter_path: str
    """Path of the weight; of a tied weight, the first path it goes by."""
    parameter: nn.Parameter = field(repr=False)
    obstacle: str | None
    """Why the weight cannot be made visible, or None."""

    @property
    def layer(self) -> str:
        """Path of the module that owns the weight, empty for the model itself."""
        return self.parameter_path.rpartition(".")[0]

    @property
    def slot(self) -> WeightSlot:
        """Where among the lowered node's arguments the weight is."""
        return _SLOT_OF_FUNCTION[self.node.target]

    @property
    def weight_node(self) -> Node | None:
        """The weight expression the node reads, None while the module still hides it."""
        weight = None if self.node.op == "call_module" else self.slot.read(self.node)
        return weight if isinstance(weight, Node) else None


def find_norms(graph_module: GraphModule) -> list[NormSite]:
    """Return the normalisations that have a weight, in execution order."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    first_path: dict[int, str] = {}
    weights = {
        path: (first_path.setdefault(id(parameter), path), parameter)
        for path, parameter in graph_module.named_parameters(remove_duplicate=False)
    }
    calls: list[tuple[Node, str, str | None]] = []
    readers: dict[int, str] = {}
    graph = whole_graph(graph_module)
    use = RegionUse(graph_module, graph)
    for node in graph.nodes:
        if use.is_call_of_a_region(node):
            continue
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module is not None and isinstance(module, _ALL):
            calls.append((node, f"{node.target}.weight", _obstacle(module)))
        elif module is not None:
            for parameter in module.parameters():
                if use.is_apart(parameter):
                    continue
                readers.setdefault(id(parameter), node.name)
        elif node.op == "call_function" and node.target in _SLOT_OF_FUNCTION:
            root = parameter_behind(_SLOT_OF_FUNCTION[node.target].read(node))
            calls.append((node, "" if root is None else str(root.target), None))
        elif node.op == "get_attr" and node.target in weights:
            for reader in _other_readers(node):
                readers.setdefault(id(weights[str(node.target)][1]), reader.name)
    found = []
    for node, path, obstacle in calls:
        if path in weights:
            other = readers.get(id(weights[path][1]))
            if obstacle is None and other is not None:
                obstacle = f"its weight is also read by {other!r}, which would not follow"
            first, parameter = weights[path]
            obstacle = obstacle or use.obstacle(node, parameter)
            found.append(NormSite(node, use.path_for(node, path, first), parameter, obstacle))
    return found


def lower_norm(lowering: Lowering, site: NormSite) -> None:
    """Replace a normalisation's call by its function on a visible weight; the result is equal to the bit.

    Its settings (``momentum``, ``eps``, …) are read from the module whenever the graph runs. The node keeps
    its name and its users. Then :meth:`Lowering.wrap_weight` takes the site like any other.
    A site that is lowered already is left alone.

    Raises:
        PassError: the site has an obstacle.
    """
    node = site.node
    if node.op != "call_module":
        return
    if site.obstacle is not None:
        raise PassError(f"{node.name!r} cannot be lowered: {site.obstacle}")
    module = lowering.graph_module.get_submodule(str(node.target))
    (x,) = (*node.args, *node.kwargs.values())
    kind = next(kind for kind in _LOWERINGS if isinstance(module, kind))

    def read(name: str) -> Node | None:
        return None if getattr(module, name, None) is None else lowering.read_of(node, name)

    function, args, options = _LOWERINGS[kind](module, read, functools.partial(lowering.setting_of, node))
    node.op, node.target, node.args, node.kwargs = "call_function", function, (x, *args), options


def _other_readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        slot = _SLOT_OF_FUNCTION.get(user.target)
        if parameter_behind(user) is not None and user.op == "call_function":
            yield from _other_readers(user)
        elif slot is None or times_read(node, user) > (slot.read(user) is node):
            yield user


Read = Callable[[str], "Node | None"]
"""Returns the node that reads a parameter or a buffer of a module, None where the module has none."""
Live = Callable[[str], Node]
"""Returns the node that reads a setting of a module."""
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _batch(module: Any, read: Read, live: Live) -> Call:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training")
    ranks = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
    options = {
        "momentum": live("momentum"),
        "eps": live("eps"),
        "ranks": next(ranks[kind] for kind in ranks if isinstance(module, kind)),
        "track_running_stats": live("track_running_stats"),
    }
    return batch_norm, tuple(map(read, names)), options


def _instance(module: Any, read: Read, live: Live) -> Call:
    names = ("weight", "bias", "running_mean", "running_var", "training")
    options = {
        "momentum": live("momentum"),
        "eps": live("eps"),
        "rank": module._get_no_batch_dim() + 1,
        "track_running_stats": live("track_running_stats"),
    }
    return instance_norm, tuple(map(read, names)), options


def _layer(module: Any, read: Read, live: Live) -> Call:
    return F.layer_norm, (tuple(module.normalized_shape), read("weight"), read("bias"), live("eps")), {}


def _rms(module: Any, read: Read, live: Live) -> Call:
    return F.rms_norm, (tuple(module.normalized_shape), read("weight"), live("eps")), {}


def _group(module: Any, read: Read, live: Live) -> Call:
    return F.group_norm, (module.num_groups, read("weight"), read("bias"), live("eps")), {}


_LOWERINGS: dict[type[nn.Module], Callable[[Any, Read, Live], Call]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance),
    nn.LayerNorm: _layer,
    nn.RMSNorm: _rms,
    nn.GroupNorm: _group,
}
_ALL: tuple[type[nn.Module], ...] = (*_LOWERINGS, nn.SyncBatchNorm)


def _obstacle(module: nn.Module) -> str | None:
    if hooks := hooks_of(module):
        return f"it has {' and '.join(hooks)}, which would no longer run"
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm takes its moments over all processes, which its function does not"
    if "weight" not in module._parameters:
        return computed("weight")
    kind = next(kind for kind in _LOWERINGS if isinstance(module, kind))
    for method in ("forward", "_check_input_dim", "_apply_instance_norm"):
        if method in vars(module):
            return f"its {method} was replaced on the instance"
        if getattr(type(module), method, None) is not getattr(kind, method, None):
            return f"{type(module).__name__} has a {method} of its own, not {kind.__name__}'s"
    return None
