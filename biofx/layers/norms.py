"""Normalisation layers: where their weights are, and how to make them visible.

Their weights (gamma) scale units and are no synapses, so no pass takes them for weight sites.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from biofx.errors import PassError
from biofx.graph.joined_graph import whole_graph
from biofx.graph.modules_by_path import modules_by_path
from biofx.graph.printing import function_name
from biofx.graph.regions import RegionUse
from biofx.layers.layer_kind import (
    LayerCall,
    LoweredCall,
    NotHeld,
    WeightSlot,
    become_call,
    computed,
    hooks_blocker,
    own_method,
)
from biofx.layers.lowering import Lowering
from biofx.layers.sites import times_read
from biofx.layers.weight_site import named_parameters, parameter_behind
from biofx.operators.norm_ops import batch_norm, instance_norm
from biofx.torch_private import rank_without_batch

Read = Callable[[str], "Node | None"]
"""Returns the node that reads a parameter or a buffer of a module, None where the module has none."""
Live = Callable[[str], Node]
"""Returns the node that reads a setting of a module."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class NormKind:
    """One kind of normalisation: its module classes, its function, and where the weight is in a call."""

    module_types: tuple[type[nn.Module], ...]
    function: Callable[..., Any]
    slot: WeightSlot
    lower: Callable[[Any, Read, Live], Arguments]
    """Returns the arguments of the function behind the input, given the module and what reads from it."""
    raised: Callable[[LoweredCall], LayerCall | None]
    """Returns the module's call that does what a call of the function does (see ``LayerKind.raised``)."""


def _gain(place: int) -> WeightSlot:
    return WeightSlot(role="gain", argument=(place, "weight"))


_BATCH_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
_INSTANCE_RANKS: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: 3,
    nn.InstanceNorm2d: 4,
    nn.InstanceNorm3d: 5,
}


def _lower_batch(module: Any, read: Read, live: Live) -> Arguments:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training")
    options = {
        "momentum": live("momentum"),
        "eps": live("eps"),
        "ranks": next(ranks for kind, ranks in _BATCH_RANKS.items() if isinstance(module, kind)),
        "track_running_stats": live("track_running_stats"),
    }
    return tuple(map(read, names)), options


def _raise_batch(call: LoweredCall) -> LayerCall:
    x, weight, bias, mean, variance, count, _ = call.node.args
    options: Any = call.node.kwargs
    kind = next(kind for kind, ranks in _BATCH_RANKS.items() if ranks == tuple(options["ranks"]))
    buffers = {"running_mean": mean, "running_var": variance, "num_batches_tracked": count}
    return _raise_with_moments(call, kind, x, weight, bias, buffers, follows=True)


def _lower_instance(module: Any, read: Read, live: Live) -> Arguments:
    names = ("weight", "bias", "running_mean", "running_var", "training")
    options = {
        "momentum": live("momentum"),
        "eps": live("eps"),
        "rank": rank_without_batch(module) + 1,
        "track_running_stats": live("track_running_stats"),
    }
    return tuple(map(read, names)), options


def _raise_instance(call: LoweredCall) -> LayerCall:
    x, weight, bias, mean, variance, _ = call.node.args
    options: Any = call.node.kwargs
    kind = next(kind for kind, rank in _INSTANCE_RANKS.items() if rank == options["rank"])
    buffers = {"running_mean": mean, "running_var": variance}
    return _raise_with_moments(call, kind, x, weight, bias, buffers, follows=False)


def _raise_with_moments(
    call: LoweredCall,
    kind: type[nn.Module],
    x: Any,
    weight: Any,
    bias: Any,
    buffers: dict[str, Any],
    *,
    follows: bool,
) -> LayerCall:
    """Return the call of a normalisation with running moments, which follow by default or do not."""
    options: Any = call.node.kwargs
    held = call.parameters({"weight": weight, "bias": bias})
    held |= {name: call.hold(source) for name, source in buffers.items()}
    size = next((value.numel() for value in held.values() if value is not None), None)
    if size is None:
        raise NotHeld
    return call.call(
        *(kind, (size,), held, (x,)),
        eps=options["eps"],
        momentum=options["momentum"],
        affine=weight is not None,
        track_running_stats=options.get("track_running_stats", follows),
    )


def _lower_affine(first: str, *names: str) -> Callable[[Any, Read, Live], Arguments]:
    """Return what lowers a normalisation whose function takes a setting, ``names`` and ``eps``, by place."""

    def lower(module: Any, read: Read, live: Live) -> Arguments:
        setting = getattr(module, first)
        setting = tuple(setting) if isinstance(setting, (tuple, list)) else setting
        return (setting, *map(read, names), live("eps")), {}

    return lower


def _raise_affine(kind: type[nn.Module], *names: str) -> Callable[[LoweredCall], LayerCall | None]:
    """Return what raises it."""

    def raised(call: LoweredCall) -> LayerCall | None:
        node = call.node
        if not isinstance(call.before, kind) or node.kwargs or len(node.args) != len(names) + 3:
            return None
        x, setting, *sources, eps = node.args
        held, weight = call.weight(dict(zip(names, sources, strict=True)))
        sizes = (setting, weight.numel()) if kind is nn.GroupNorm else (setting,)
        options: dict[str, Any] = {"bias": held["bias"] is not None} if kind is nn.LayerNorm else {}
        return call.call(kind, sizes, held, (x,), eps=eps, **options)

    return raised


def _affine(kind: type[nn.Module], function: Callable[..., Any], first: str, *names: str) -> NormKind:
    return NormKind(
        *((kind,), function, _gain(2)),
        *(_lower_affine(first, *names), _raise_affine(kind, *names)),
    )


NORM_KINDS = (
    NormKind(tuple(_BATCH_RANKS), batch_norm, _gain(1), _lower_batch, _raise_batch),
    NormKind(tuple(_INSTANCE_RANKS), instance_norm, _gain(1), _lower_instance, _raise_instance),
    _affine(nn.LayerNorm, F.layer_norm, "normalized_shape", "weight", "bias"),
    _affine(nn.RMSNorm, F.rms_norm, "normalized_shape", "weight"),
    _affine(nn.GroupNorm, F.group_norm, "num_groups", "weight", "bias"),
)
_KIND_OF_FUNCTION: dict[Any, NormKind] = {kind.function: kind for kind in NORM_KINDS}
_SLOT_OF_FUNCTION: dict[Any, WeightSlot] = {
    **{kind.function: kind.slot for kind in NORM_KINDS},
    F.batch_norm: _gain(3),
    F.instance_norm: _gain(3),
}
_TYPES: tuple[type[nn.Module], ...] = tuple(
    module_type for kind in NORM_KINDS for module_type in kind.module_types
)
_ALL: tuple[type[nn.Module], ...] = (*_TYPES, nn.SyncBatchNorm)


_MULTIPLIES: frozenset[Any] = frozenset(
    {operator.mul, operator.imul, torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, "mul", "multiply"}
)
_ADDS: frozenset[Any] = frozenset({operator.add, torch.add, Tensor.add, "add"})
_LEAVES_VALUES = frozenset(
    {
        *("float", "to", "type_as", "double", "half", "bfloat16", "contiguous", "clone", "getitem"),
        *("unsqueeze", "squeeze", "view", "reshape", "expand", "expand_as", "flatten", "constrain_sign"),
    }
)


@dataclass(frozen=True)
class Gain:
    """A factor on activity: a parameter with at most one axis longer than 1, and a number that is added."""

    root: Node
    """The node that reads the parameter."""
    offset: float = 0.0
    """What is added to the parameter, dimensionless."""


def gain_behind(
    factor: Any, parameters: Mapping[str, tuple[str, nn.Parameter]], offset: float = 0.0
) -> Gain | None:
    """Return the parameter that is behind a factor of a product, None where the factor is something else.

    Args:
        factor: an argument of the product.
        parameters: those of the model by every path, as ``named_parameters`` returns them.
        offset: what is added to the parameter on the way from here.
    """
    if not isinstance(factor, Node):
        return None
    if factor.op == "get_attr":
        held = parameters.get(str(factor.target))
        is_gain = held is not None and sum(size > 1 for size in held[1].shape) <= 1
        return Gain(factor, offset) if is_gain else None
    if factor.op not in ("call_function", "call_method"):
        return None
    if factor.target in _ADDS and len(factor.args) == 2 and not factor.kwargs:
        numbers = [given for given in factor.args if isinstance(given, (int, float))]
        nodes = [given for given in factor.args if isinstance(given, Node)]
        if len(numbers) == len(nodes) == 1:
            return gain_behind(nodes[0], parameters, offset + numbers[0])
        return None
    moves = function_name(factor.target) in _LEAVES_VALUES
    return gain_behind(factor.args[0], parameters, offset) if moves and factor.args else None


def norm_kind_of_call(node: Node) -> NormKind | None:
    """Return the kind of normalisation that a call of a function computes, None for anything else."""
    return _KIND_OF_FUNCTION.get(node.target) if node.op == "call_function" else None


@dataclass(frozen=True)
class NormSite:
    """One use of the weight of a normalisation."""

    node: Node
    """The node that computes the normalisation's output."""
    parameter_path: str
    """Path of the weight; of a tied weight, the first path it goes by."""
    parameter: nn.Parameter = field(repr=False)
    lowering_blocker: str | None
    """Why the weight cannot be made visible, or None."""
    own_slot: WeightSlot | None = None
    """Of a gain that is written out as a product, where among the arguments it is."""
    offset: float = 0.0
    """What is added to the weight to make the gain, dimensionless."""

    @property
    def layer(self) -> str:
        """Path of the module that owns the weight, empty for the model itself."""
        return self.parameter_path.rpartition(".")[0]

    @property
    def slot(self) -> WeightSlot:
        """Where among the lowered node's arguments the weight is."""
        return self.own_slot or _SLOT_OF_FUNCTION[self.node.target]

    @property
    def weight_node(self) -> Node | None:
        """The weight expression the node reads, None while the module still hides it."""
        weight = None if self.node.op == "call_module" else self.slot.read(self.node)
        return weight if isinstance(weight, Node) else None


def find_norms(graph_module: GraphModule) -> list[NormSite]:
    """Return the normalisations that have a weight, and gains that are written out, in execution order."""
    modules = modules_by_path(graph_module)
    weights = named_parameters(graph_module)
    calls: list[tuple[Node, str, str | None]] = []
    written_out: dict[Node, tuple[WeightSlot, float]] = {}
    readers: dict[int, str] = {}
    graph = whole_graph(graph_module)
    use = RegionUse(graph_module, graph)
    for node in graph.nodes:
        if use.is_call_of_a_region(node):
            continue
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module is not None and isinstance(module, _ALL):
            calls.append((node, f"{node.target}.weight", _blocker(module)))
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
        elif (factor := _gain_of_product(node, weights)) is not None:
            calls.append((node, str(factor[1].root.target), None))
            written_out[node] = factor[0], factor[1].offset
    found = []
    for node, path, blocker in calls:
        if path in weights:
            place, offset = written_out.get(node, (None, 0.0))
            other = None if place is not None else readers.get(id(weights[path][1]))
            if blocker is None and other is not None:
                blocker = f"its weight is also read by {other!r}, which would not follow"
            first, parameter = weights[path]
            blocker = blocker or use.obstacle(node, parameter)
            path = use.path_for(node, path, first)
            found.append(NormSite(node, path, parameter, blocker, place, offset))
    return found


def _gain_of_product(
    node: Node, weights: Mapping[str, tuple[str, nn.Parameter]]
) -> tuple[WeightSlot, Gain] | None:
    """Return where among the factors of a product a gain is, None if none or both are one."""
    if node.op not in ("call_function", "call_method") or node.target not in _MULTIPLIES:
        return None
    gains = [(place, gain_behind(factor, weights)) for place, factor in enumerate(node.args)]
    found = [(place, gain) for place, gain in gains if gain is not None]
    if len(found) != 1 or len(node.args) != 2:
        return None
    (place, gain) = found[0]
    return WeightSlot(role="gain", argument=(place, ("input", "other")[place])), gain


def lower_norm(lowering: Lowering, site: NormSite) -> None:
    """Replace a normalisation's call by its function on a visible weight; the result is equal to the bit.

    Its settings (``momentum``, ``eps``, …) are read from the module whenever the graph runs. The node keeps
    its name and its users. Then :meth:`Lowering.wrap_weight` takes the site like any other.
    A site that is lowered already is left alone.

    Raises:
        PassError: the normalisation cannot be lowered.
    """
    node = site.node
    if node.op != "call_module":
        return
    if site.lowering_blocker is not None:
        raise PassError(f"{node.name!r} cannot be lowered: {site.lowering_blocker}")
    module = lowering.graph_module.get_submodule(str(node.target))
    (x,) = (*node.args, *node.kwargs.values())
    kind = next(kind for kind in NORM_KINDS if isinstance(module, kind.module_types))

    def read(name: str) -> Node | None:
        return None if getattr(module, name, None) is None else lowering.read_of(node, name)

    args, options = kind.lower(module, read, functools.partial(lowering.setting_of, node))
    become_call(node, kind.function, (x, *args), options)


def _other_readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        slot = _SLOT_OF_FUNCTION.get(user.target)
        if parameter_behind(user) is not None and user.op == "call_function":
            yield from _other_readers(user)
        elif slot is None or times_read(node, user) > (slot.read(user) is node):
            yield user


def _blocker(module: nn.Module) -> str | None:
    """Return why the weight of a normalisation cannot be made visible, None if it can."""
    if blocker := hooks_blocker(module):
        return blocker
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm takes its moments over all processes, which its function does not"
    if "weight" not in module._parameters:
        return computed("weight")
    kind = next(kind for kind in _TYPES if isinstance(module, kind))
    return own_method(module, kind, ("forward", "_check_input_dim", "_apply_instance_norm"))
