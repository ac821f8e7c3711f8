"""Which module a call of a layer's function is a call of: the other direction of lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from biofx.layers.layer_kinds import EMBEDDING, EMBEDDING_BAG, KIND_OF_FUNCTION, LayerKind, kind_of_call
from biofx.layers.lowering import OPTIONS
from biofx.layers.sites import innermost_path
from biofx.layers.weight_slots import slots_of_call
from biofx.operators.compound_ops import GATES, attend, recurrent
from biofx.operators.norm_ops import batch_norm, instance_norm

Held = dict[str, "Tensor | None"]
"""Parameters and buffers by their paths in the module."""


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer's function on parameters, and the module that does the same."""

    path: str
    """Where the module was that the call came from."""
    held: Held
    make: Callable[[], nn.Module]
    """Makes the module, on the meta device, with everything but what it holds."""
    options: str
    """What else makes two calls calls of one layer."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    """What the module is called with."""

    @classmethod
    def of(cls, node: Node, graph_module: GraphModule, layers: Mapping[str, nn.Module]) -> LayerCall | None:
        """Return what a node calls; None where it is no layer's call, or never was a module's.

        Args:
            node: any node.
            graph_module: its module.
            layers: the modules by their paths.
        """
        if node.op != "call_function":
            return None
        path = innermost_path(node)
        reader, before = _READERS.get(node.target), layers.get(path)
        if reader is None or not path or before is None:
            return None
        return reader(_Reading(node, graph_module, path, before))

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two calls calls of one layer."""
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


class _Missing(Exception):  # noqa: N818
    """An argument is no parameter or buffer that a module could hold."""


@dataclass(frozen=True)
class _Reading:
    """A call, and what its arguments hold."""

    node: Node
    graph_module: GraphModule
    path: str
    before: nn.Module

    def hold(self, source: Any) -> Any:
        """Return the tensor that an argument reads, None where it is None."""
        if source is None:
            return None
        if not isinstance(source, Node) or source.op != "get_attr":
            raise _Missing
        owner, _, name = str(source.target).rpartition(".")
        value = getattr(self.graph_module.get_submodule(owner), name)
        if not isinstance(value, Tensor):
            raise _Missing
        return value

    def parameters(self, sources: Mapping[str, Any]) -> Held:
        held = {name: self.hold(source) for name, source in sources.items()}
        if any(value is not None and not isinstance(value, nn.Parameter) for value in held.values()):
            raise _Missing
        return held

    def call(
        self,
        make: Callable[..., nn.Module],
        args: tuple[Any, ...],
        held: Held,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> LayerCall:
        """Return the call of a module that is made with ``args`` and ``options``."""

        def made() -> nn.Module:
            return make(*args, **options, device="meta")

        told = repr((args, sorted(options.items())))
        return LayerCall(self.path, held, made, told, inputs, {} if kwargs is None else kwargs)


def _or_none(read: Callable[[_Reading], LayerCall | None]) -> Callable[[_Reading], LayerCall | None]:
    def reader(reading: _Reading) -> LayerCall | None:
        try:
            return read(reading)
        except _Missing:
            return None

    return reader


def _layer(reading: _Reading) -> LayerCall | None:
    node, kind = reading.node, KIND_OF_FUNCTION[reading.node.target]
    options: dict[str, Any] = {name: value for name, value in node.kwargs.items() if name != "bias"}
    if not isinstance(reading.before, kind.module_type) or not set(options) <= set(OPTIONS):
        return None
    if not 1 < len(node.args) < 4:
        return None
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    held = reading.parameters({"weight": node.args[1], "bias": bias})
    weight = held["weight"]
    if weight is None:
        return None
    ends, kernel = _ends(kind, weight, options.get("groups", 1))
    options["bias"] = bias is not None
    return reading.call(kind.module_type, (*ends, *kernel), held, (node.args[0],), **options)


def _ends(kind: LayerKind, weight: Tensor, groups: int) -> tuple[tuple[int, int], tuple[Any, ...]]:
    shape = weight.shape
    ends = (shape[0], shape[1] * groups) if kind.transposed else (shape[1] * groups, shape[0])
    return ends, ((tuple(shape[2:]),) if kind.kernel_axes else ())


def _batch_norm(reading: _Reading) -> LayerCall | None:
    x, weight, bias, mean, variance, count, _ = reading.node.args
    options: Any = reading.node.kwargs
    held = reading.parameters({"weight": weight, "bias": bias})
    names = {"running_mean": mean, "running_var": variance, "num_batches_tracked": count}
    held |= {name: reading.hold(source) for name, source in names.items()}
    kind = {(2, 3): nn.BatchNorm1d, (4,): nn.BatchNorm2d, (5,): nn.BatchNorm3d}[tuple(options["ranks"])]
    return reading.call(
        *(kind, (_size(held),), held, (x,)),
        eps=options["eps"],
        momentum=options["momentum"],
        affine=weight is not None,
        track_running_stats=options.get("track_running_stats", True),
    )


def _instance_norm(reading: _Reading) -> LayerCall | None:
    x, weight, bias, mean, variance, _ = reading.node.args
    options: Any = reading.node.kwargs
    held = reading.parameters({"weight": weight, "bias": bias})
    held |= {"running_mean": reading.hold(mean), "running_var": reading.hold(variance)}
    kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[options["rank"]]
    return reading.call(
        *(kind, (_size(held),), held, (x,)),
        eps=options["eps"],
        momentum=options["momentum"],
        affine=weight is not None,
        track_running_stats=options.get("track_running_stats", False),
    )


def _size(held: Held) -> int:
    value = next((value for value in held.values() if value is not None), None)
    if value is None:
        raise _Missing
    return value.numel()


def _affine_norm(kind: type[nn.Module], *names: str) -> Callable[[_Reading], LayerCall | None]:
    """Return the reader of a function whose arguments have these names and are all given by place."""

    def read(reading: _Reading) -> LayerCall | None:
        node = reading.node
        if not isinstance(reading.before, kind) or node.kwargs or len(node.args) != len(names) + 1:
            return None
        given: dict[str, Any] = dict(zip(names, node.args[1:], strict=True))
        held = reading.parameters({name: given[name] for name in ("weight", "bias") if name in names})
        if held["weight"] is None:
            return None
        shape = given["normalized_shape"] if "normalized_shape" in given else given["num_groups"]
        sizes = (shape,) if "normalized_shape" in given else (shape, held["weight"].numel())
        named = "bias" in names and kind is not nn.GroupNorm
        options: dict[str, Any] = {"bias": given["bias"] is not None} if named else {}
        return reading.call(kind, sizes, held, (node.args[0],), eps=given["eps"], **options)

    return read


def _recurrent(reading: _Reading) -> LayerCall | None:
    node = reading.node
    x, state, weights, _ = node.args
    options: dict[str, Any] = dict(node.kwargs)
    mode, kind = options.pop("mode"), kind_of_call(node)
    first: Any = reading.hold(weights[0])  # type: ignore[index]
    slots = slots_of_call(node, kind) if kind is not None else ()
    held: Held = {}
    has_bias = len(weights) // (options.get("num_layers", 1) * (1 + options.get("bidirectional", False))) > 3  # type: ignore[arg-type]
    for slot in slots:
        held[slot.name] = reading.parameters({"w": slot.read(node)})["w"]
        if has_bias and slot.role == "hidden":
            for offset, name in ((1, "bias_ih"), (2, "bias_hh")):
                source = weights[slot.index + offset]  # type: ignore[index, operator]
                held[slot.name.replace("weight_hh", name)] = reading.parameters({"w": source})["w"]
    projected = next((value for name, value in held.items() if name.startswith("weight_hr")), None)
    if mode.startswith("RNN_"):
        options["nonlinearity"] = mode.removeprefix("RNN_").lower()
    if projected is not None:
        options["proj_size"] = projected.shape[0]
    sizes = (first.shape[1], first.shape[0] // GATES[mode])
    make: Any = nn.RNN if kind is None else kind.module_type
    return reading.call(make, sizes, held, (x,) if state is None else (x, state), bias=has_bias, **options)


_ATTENTION_INPUTS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


def _attention(reading: _Reading) -> LayerCall | None:
    node = reading.node
    arguments: tuple[Any, ...] = node.args
    query, key, value, weights, _ = arguments
    given: dict[str, Any] = dict(node.kwargs)
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


def _lookup(kind: LayerKind) -> Callable[[_Reading], LayerCall | None]:
    def read(reading: _Reading) -> LayerCall | None:
        node = reading.node
        if not isinstance(reading.before, kind.module_type) or len(node.args) != 2:
            return None
        options: dict[str, Any] = dict(node.kwargs)
        inputs = {name: options.pop(name) for name in _LOOKUP_INPUTS if name in options}
        held = reading.parameters({"weight": node.args[1]})
        weight = held["weight"]
        if weight is None:
            return None
        return reading.call(kind.module_type, tuple(weight.shape), held, (node.args[0],), inputs, **options)

    return read


def _bilinear(reading: _Reading) -> LayerCall | None:
    node = reading.node
    if not isinstance(reading.before, nn.Bilinear) or node.kwargs or not 2 < len(node.args) < 5:
        return None
    bias = node.args[3] if len(node.args) > 3 else None
    held = reading.parameters({"weight": node.args[2], "bias": bias})
    weight = held["weight"]
    if weight is None:
        return None
    out, first, second = weight.shape
    return reading.call(nn.Bilinear, (first, second, out), held, node.args[:2], bias=bias is not None)


_READERS: dict[Any, Callable[[_Reading], LayerCall | None]] = {
    **dict.fromkeys(KIND_OF_FUNCTION, _or_none(_layer)),
    batch_norm: _or_none(_batch_norm),
    instance_norm: _or_none(_instance_norm),
    F.layer_norm: _or_none(_affine_norm(nn.LayerNorm, "normalized_shape", "weight", "bias", "eps")),
    F.rms_norm: _or_none(_affine_norm(nn.RMSNorm, "normalized_shape", "weight", "eps")),
    F.group_norm: _or_none(_affine_norm(nn.GroupNorm, "num_groups", "weight", "bias", "eps")),
    F.embedding: _or_none(_lookup(EMBEDDING)),
    F.embedding_bag: _or_none(_lookup(EMBEDDING_BAG)),
    F.bilinear: _or_none(_bilinear),
    recurrent: _or_none(_recurrent),
    attend: _or_none(_attention),
}
