"""The way back from lowering: ``linear(x, weight, bias)`` becomes a call of an ``nn.Linear`` again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from biofx.deploy.plain_modules import take_hooks
from biofx.graph.regions import region_paths
from biofx.layers.layer_kinds import (
    EMBEDDING,
    EMBEDDING_BAG,
    KIND_OF_FUNCTION,
    LAYER_KINDS,
    LayerKind,
    kind_of_call,
)
from biofx.layers.lowering import OPTIONS
from biofx.layers.sites import innermost_path
from biofx.layers.weight_site import computed_behind
from biofx.layers.weight_slots import slots_of_call
from biofx.layers.weight_values import erase_unused_reads
from biofx.operators.compound_ops import GATES, attend, recurrent
from biofx.operators.norm_ops import batch_norm, instance_norm


def raise_layers(graph_module: GraphModule) -> None:
    """Call each layer that was lowered as a module again.

    The module is a new one, at the path of the old one unless the graph still needs what is there. Calls with
    different weights become calls of different modules.
    """
    _call_parametrized(graph_module)
    layers = dict(graph_module.named_modules(remove_duplicate=False))
    raised = {node: call for node in graph_module.graph.nodes if (call := _read(node, graph_module, layers))}
    places = _Places(graph_module, set(raised), layers)
    for node, call in raised.items():
        node.target = places.place(call)
        node.op, node.args, node.kwargs = "call_module", call.args, dict(call.kwargs)
    erase_unused_reads(graph_module)


def _call_parametrized(graph_module: GraphModule) -> None:
    """Call each layer again whose weight a parametrization computes and nothing else changes."""
    for node in list(graph_module.graph.nodes):
        kind = kind_of_call(node)
        weight = node.args[1] if kind in LAYER_KINDS and len(node.args) > 1 else None
        path = computed_behind(weight)
        if path is None or not isinstance(weight, Node) or weight.target is not getattr:
            continue
        layer = path.rpartition(".")[0]
        if getattr(graph_module.get_submodule(layer), "padding_mode", "zeros") == "zeros":
            node.op, node.target, node.args, node.kwargs = "call_module", layer, (node.args[0],), {}
            graph_module.graph.erase_node(weight)


_Held = dict[str, "Tensor | None"]
"""Parameters and buffers by their paths in a module."""


@dataclass(frozen=True)
class _LayerCall:
    """A call of a layer's function on parameters, and the module that computes the same."""

    path: str
    """Where the module was that the call came from."""
    held: _Held
    make: Callable[[], nn.Module]
    """Makes the module on the meta device, without its parameters and buffers."""
    options: str
    """The module's sizes and options, as a text to compare."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    """What the module is called with."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two calls of one layer."""
        return (*((name, id(value)) for name, value in self.held.items()), self.options)

    def module(self) -> nn.Module:
        """Make the layer."""
        made = self.make()
        for path, value in self.held.items():
            owner_path, _, name = path.rpartition(".")
            owner: Any = made.get_submodule(owner_path)
            table = owner._buffers if name in owner._buffers else owner._parameters
            table[name] = value
        if isinstance(made, nn.RNNBase):
            made._init_flat_weights()
        return made


@dataclass
class _Places:
    """Where in the tree the layers go."""

    graph_module: GraphModule
    leaving: set[Node]
    """Nodes that will no longer read what they read now."""
    before: dict[str, nn.Module]
    """The modules by their paths, before any is replaced."""
    _taken: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        staying = [node for node in self.graph_module.graph.nodes if node not in self.leaving]
        called = {str(node.target) for node in staying if node.op == "call_module"}
        self._called = called.difference(region_paths(self.graph_module))  # a region may be replaced
        self._read = {
            str(node.target)
            for node in staying
            if node.op == "get_attr" and any(user not in self.leaving for user in node.users)
        }

    def place(self, call: _LayerCall) -> str:
        """Return the path of the layer of a call, which is made if there is none yet."""
        number = 0
        while True:
            path = f"{call.path}_{number}" if number else call.path
            if self._taken.get(path) == call.key:
                return path
            if path not in self._taken and self._is_free(path, call, original=number == 0):
                self._taken[path] = call.key
                self._put(path, call.module())
                return path
            number += 1

    def _put(self, path: str, made: nn.Module) -> None:
        """Put a layer at a path, with the hooks of the module there.

        A region is replaced at all its paths, and the modules that it calls besides are kept.
        """
        paths = [path]
        before = self.before.get(path)
        if before is not None:
            take_hooks(made, before)
        if before is not None and path in region_paths(self.graph_module):
            for name, module in before.named_children():
                made._modules.setdefault(name, module)
            everything = self.graph_module.named_modules(remove_duplicate=False)
            paths = [place for place, module in everything if module is before]
        for place in paths:
            owner, _, name = place.rpartition(".")
            self.graph_module.get_submodule(owner).add_module(name, made)

    def _is_free(self, path: str, call: _LayerCall, *, original: bool) -> bool:
        if not original:
            owner, _, name = path.rpartition(".")
            return not hasattr(self.graph_module.get_submodule(owner), name)
        for read in (read for read in self._read if read.startswith(f"{path}.")):
            if call.held.get(read[len(path) + 1 :]) is not _value(self.graph_module, read):
                return False
        return not any(called == path or called.startswith(f"{path}.") for called in self._called)


def _value(graph_module: GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def _read(node: Node, graph_module: GraphModule, layers: Mapping[str, nn.Module]) -> _LayerCall | None:
    """Return the call of a layer that a node was lowered from; None where it is none."""
    reader, path = _READERS.get(node.target), innermost_path(node)
    if node.op != "call_function" or reader is None or not path or path not in layers:
        return None
    try:
        return reader(_Reading(node, graph_module, path, layers[path]))
    except _NotALayerError:
        return None


class _NotALayerError(Exception):
    """No module computes the same: an argument is no parameter or buffer, or the call has other options."""


@dataclass(frozen=True)
class _Reading:
    """A call of a layer's function, and the module that it came from."""

    node: Node
    graph_module: GraphModule
    path: str
    before: nn.Module

    def require(self, condition: bool) -> None:
        """Give up where the call is none of a module.

        Raises:
            _NotALayerError: the condition does not hold.
        """
        if not condition:
            raise _NotALayerError

    def tensor(self, source: Any) -> Any:
        """Return the tensor that an argument reads, None where it is None."""
        if source is None:
            return None
        self.require(isinstance(source, Node) and source.op == "get_attr")
        value = _value(self.graph_module, str(source.target))
        self.require(isinstance(value, Tensor))
        return value

    def parameters(self, sources: Mapping[str, Any]) -> _Held:
        """Return the parameters that arguments read, by the names that the module has for them."""
        held = {name: self.tensor(source) for name, source in sources.items()}
        self.require(all(value is None or isinstance(value, nn.Parameter) for value in held.values()))
        return held

    def weight_and_bias(self, weight: Any, *bias: Any) -> tuple[Tensor, _Held]:
        """Return the weight that the call must have, and with it the bias if the layer has one."""
        held = self.parameters(dict(zip(("weight", "bias"), (weight, *bias), strict=False)))
        found: Any = held["weight"]
        self.require(found is not None)
        return found, held

    def call(
        self,
        make: Callable[..., nn.Module],
        args: tuple[Any, ...],
        held: _Held,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> _LayerCall:
        """Return the call of a module that is made with ``args`` and ``options``."""

        def made() -> nn.Module:
            return make(*args, **options, device="meta")

        text = repr((args, sorted(options.items())))
        return _LayerCall(self.path, held, made, text, inputs, {} if kwargs is None else kwargs)


def _layer(reading: _Reading) -> _LayerCall:
    node, kind = reading.node, KIND_OF_FUNCTION[reading.node.target]
    options: dict[str, Any] = {name: value for name, value in node.kwargs.items() if name != "bias"}
    reading.require(isinstance(reading.before, kind.module_type) and set(options) <= set(OPTIONS))
    reading.require(1 < len(node.args) < 4)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    weight, held = reading.weight_and_bias(node.args[1], bias)
    groups, shape = options.get("groups", 1), weight.shape
    ends = (shape[0], shape[1] * groups) if kind.transposed else (shape[1] * groups, shape[0])
    kernel = (tuple(shape[2:]),) if kind.kernel_axes else ()
    options["bias"] = bias is not None
    return reading.call(kind.module_type, (*ends, *kernel), held, (node.args[0],), **options)


def _running_norm(reading: _Reading) -> _LayerCall:
    node = reading.node
    options: Any = node.kwargs
    x, weight, bias, *running, _ = node.args
    held = reading.parameters({"weight": weight, "bias": bias})
    names = ("running_mean", "running_var", "num_batches_tracked")
    held |= {name: reading.tensor(source) for name, source in zip(names, running, strict=False)}
    sizes = [value.numel() for value in held.values() if value is not None]
    reading.require(bool(sizes))
    is_batch = node.target is batch_norm
    return reading.call(
        _RUNNING_NORMS[tuple(options["ranks"]) if is_batch else options["rank"]],
        (sizes[0],),
        held,
        (x,),
        eps=options["eps"],
        momentum=options["momentum"],
        affine=weight is not None,
        track_running_stats=options.get("track_running_stats", is_batch),
    )


_RUNNING_NORMS: dict[Any, type[nn.Module]] = {
    (2, 3): nn.BatchNorm1d,
    (4,): nn.BatchNorm2d,
    (5,): nn.BatchNorm3d,
    3: nn.InstanceNorm1d,
    4: nn.InstanceNorm2d,
    5: nn.InstanceNorm3d,
}


def _affine_norm(kind: type[nn.Module], count: int) -> Callable[[_Reading], _LayerCall]:
    """Return the reader of ``f(x, shape, weight, [bias,] eps)``, which has that many arguments."""

    def read(reading: _Reading) -> _LayerCall:
        node = reading.node
        reading.require(isinstance(reading.before, kind) and not node.kwargs)
        reading.require(len(node.args) == count)
        x, shape, *affine, eps = node.args
        weight, held = reading.weight_and_bias(*affine)
        sizes = (shape,) if kind is not nn.GroupNorm else (shape, weight.numel())
        options: dict[str, Any] = {"bias": affine[1] is not None} if kind is nn.LayerNorm else {}
        return reading.call(kind, sizes, held, (x,), eps=eps, **options)

    return read


def _recurrent(reading: _Reading) -> _LayerCall:
    node = reading.node
    x, state, _, _ = node.args
    weights: Any = node.args[2]
    options: dict[str, Any] = dict(node.kwargs)
    mode, kind = options.pop("mode"), kind_of_call(node)
    first = reading.tensor(weights[0])
    slots = slots_of_call(node, kind) if kind is not None else ()
    held: _Held = {}
    directions = 1 + options.get("bidirectional", False)
    has_bias = len(weights) // (options.get("num_layers", 1) * directions) > 3
    for slot in slots:
        held |= reading.parameters({slot.name: slot.read(node)})
        if has_bias and slot.role == "hidden":
            for offset, name in ((1, "bias_ih"), (2, "bias_hh")):
                source = weights[slot.index + offset]  # type: ignore[operator]
                held |= reading.parameters({slot.name.replace("weight_hh", name): source})
    projected = next((value for name, value in held.items() if name.startswith("weight_hr")), None)
    if mode.startswith("RNN_"):
        options["nonlinearity"] = mode.removeprefix("RNN_").lower()
    if projected is not None:
        options["proj_size"] = projected.shape[0]
    sizes = (first.shape[1], first.shape[0] // GATES[mode])
    make: Any = nn.RNN if kind is None else kind.module_type
    return reading.call(make, sizes, held, (x,) if state is None else (x, state), bias=has_bias, **options)


_ATTENTION_INPUTS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


def _attention(reading: _Reading) -> _LayerCall:
    query, key, value, _, _ = reading.node.args
    weights: Any = reading.node.args[3]
    given: dict[str, Any] = dict(reading.node.kwargs)
    inputs = {name: given.pop(name) for name in _ATTENTION_INPUTS if name in given}
    names = {"in_proj_bias": "in_proj_bias", "out_proj_bias": "out_proj.bias"}
    biases = {path: given.pop(name, None) for name, path in names.items()}
    extra = {name: given.pop(name, None) for name in ("bias_k", "bias_v")}
    *projections, output = weights
    joint = len(projections) == 1
    paths = ["in_proj_weight"] if joint else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    held = reading.parameters(
        {**dict(zip(paths, projections, strict=True)), "out_proj.weight": output, **biases, **extra}
    )
    options = {
        "bias": biases["in_proj_bias"] is not None,
        "add_bias_kv": extra["bias_k"] is not None,
        **given,
    }
    size: Any = held["out_proj.weight"]
    if not joint:
        ends: list[Any] = [held[path] for path in paths[1:]]
        options |= {"kdim": ends[0].shape[1], "vdim": ends[1].shape[1]}
    num_heads = options.pop("num_heads")
    return reading.call(
        nn.MultiheadAttention, (size.shape[0], num_heads), held, (query, key, value), inputs, **options
    )


_LOOKUP_INPUTS = ("offsets", "per_sample_weights")


def _lookup(kind: LayerKind) -> Callable[[_Reading], _LayerCall]:
    """Return the reader of an embedding's function."""

    def read(reading: _Reading) -> _LayerCall:
        node = reading.node
        reading.require(isinstance(reading.before, kind.module_type) and len(node.args) == 2)
        options: dict[str, Any] = dict(node.kwargs)
        inputs = {name: options.pop(name) for name in _LOOKUP_INPUTS if name in options}
        weight, held = reading.weight_and_bias(node.args[1])
        return reading.call(kind.module_type, tuple(weight.shape), held, (node.args[0],), inputs, **options)

    return read


def _bilinear(reading: _Reading) -> _LayerCall:
    node = reading.node
    reading.require(isinstance(reading.before, nn.Bilinear) and not node.kwargs and 2 < len(node.args) < 5)
    bias = node.args[3] if len(node.args) > 3 else None
    weight, held = reading.weight_and_bias(node.args[2], bias)
    out, first, second = weight.shape
    return reading.call(nn.Bilinear, (first, second, out), held, node.args[:2], bias=bias is not None)


_READERS: dict[Any, Callable[[_Reading], _LayerCall]] = {
    **dict.fromkeys(KIND_OF_FUNCTION, _layer),
    batch_norm: _running_norm,
    instance_norm: _running_norm,
    F.layer_norm: _affine_norm(nn.LayerNorm, 5),
    F.rms_norm: _affine_norm(nn.RMSNorm, 4),
    F.group_norm: _affine_norm(nn.GroupNorm, 5),
    F.embedding: _lookup(EMBEDDING),
    F.embedding_bag: _lookup(EMBEDDING_BAG),
    F.bilinear: _bilinear,
    recurrent: _recurrent,
    attend: _attention,
}
