"""Turn each unit of a circuit into an excitatory and an inhibitory copy, side by side, if that can be done.

All layers that make the units of a circuit, all weights that read them, and all operations between must take
part: operations that name a number of channels, or that bring in a tensor with one entry per channel, cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from biofx.analysis import rules_elementwise as elementwise
from biofx.analysis import rules_norms_pooling as layers
from biofx.analysis import rules_parts as parts
from biofx.analysis import rules_shapes as shapes
from biofx.analysis.forward import rule_for
from biofx.analysis.layout import Axis
from biofx.analysis.unit_groups import UnitGroups
from biofx.analysis.units import Reading, Source, UnitRule, UnitValue
from biofx.graph.regions import region_output
from biofx.layers.lowering import Lowering
from biofx.layers.weight_site import WeightSite, sum_behind
from biofx.operators.sign_ops import drop_pairs
from biofx.plasticity.model_states import bio_module_at, kept_state
from biofx.rewriting.gains import has_own_bias, shared_parameters

_ANY_NUMBER_OF_CHANNELS: frozenset[UnitRule] = frozenset(
    {
        *(elementwise.keeps, elementwise.never_negative, elementwise.perhaps_negative, elementwise.bounded),
        *(elementwise.added, elementwise.multiplied, elementwise.divided, elementwise.chosen),
        *(elementwise.masked, parts.joined),
        *(layers.normalised, layers.pooled_over_space),
        *(shapes.flattened, shapes.reshaped, shapes.reduced, shapes.axis_removed, shapes.axis_inserted),
        *(shapes.permuted, shapes.transposed),
    }
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
_ARITHMETIC: frozenset[UnitRule] = frozenset(
    {
        *(elementwise.added, elementwise.multiplied, elementwise.divided, elementwise.chosen),
        *(elementwise.masked, elementwise.bounded),
    }
)
_ACROSS_CHANNELS = frozenset({F.normalize})
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Circuit:
    """Units that must be expanded together: who makes them, who reads them, and what is between."""

    sources: list[Source]
    readings: list[Reading]
    nodes: list[Node]


def circuits(groups: UnitGroups) -> list[Circuit]:
    """Return what belongs together, in execution order."""
    others: list[tuple[object, Tensor]] = [(n, reading.units) for n, reading in enumerate(groups.readings)]
    others += [
        (node, entry.layout.labels.flatten())
        for node, value in groups.values.items()
        for entry in _tensors(value)
        if entry.layout is not None
    ]
    found = [
        Circuit(
            sorted((m for m in members if isinstance(m, Source)), key=lambda source: source.first),
            [groups.readings[number] for number in sorted(m for m in members if isinstance(m, int))],
            sorted(member for member in members if isinstance(member, Node)),
        )
        for members in groups.connected(others)
    ]
    return sorted(found, key=lambda circuit: circuit.sources[0].first)


def _tensors(value: UnitValue) -> Iterator[UnitValue]:
    yield value
    for part in value.parts or ():
        yield from _tensors(part)


class Expandability:
    """Decides which circuits can be expanded.

    Args:
        groups: the units of the graph.
        graph_module: the model.
        makers: the uses of each weight, by its path.
    """

    def __init__(
        self, groups: UnitGroups, graph_module: GraphModule, makers: Mapping[str, Sequence[WeightSite]]
    ) -> None:
        self._groups = groups
        self._graph_module = graph_module
        self._makers = makers
        self._making = {site.node for sites in makers.values() for site in sites}
        self._shared = shared_parameters(graph_module)
        self._calls = Counter(str(node.target) for node in graph_module.graph.find_nodes(op="call_module"))

    def why_not(self, circuit: Circuit) -> str | None:
        """Return why a circuit cannot be expanded, None if it can."""
        for source in circuit.sources:
            if source.kind != "layer":
                region = self._groups.regions.get(source.name)
                if region is not None:
                    return f"what makes its units is not known: Python calls {region!r}"
                return f"no layer makes its units: they begin at {source.name!r}"
            reason = self._used_without_units(source.name)
            reason = reason or self._unmakeable(self._makers[source.name][0]) or self._is_plastic(source.name)
            if reason is not None:
                return f"its units are made by {source.name!r}: {reason}"
        for reading in circuit.readings:
            path = reading.site.parameter_path
            reason = self._used_without_units(path) or _blocker(reading.site) or _unreadable(reading)
            reason = reason or self._is_plastic(path)
            if reason is not None:
                return f"its units are read by {path!r}: {reason}"
        inside = set(circuit.nodes)
        readers = {reading.site.node for reading in circuit.readings}
        for node in circuit.nodes:
            reason = None if node in self._making else self._names_channels(node, inside)
            if reason is not None:
                return f"its units go through {node.name!r}, {reason}"
            for user in node.users:
                if user.op == "output":
                    return "its units are an output of the model"
                if user.target is region_output:
                    return f"what reads its units is not known: Python calls {user.args[0]!r}"
                if user not in inside and user not in readers and self._groups.values[user].has_units:
                    return f"its units go into {user.name!r}, behind which they are not known"
        return None

    def _used_without_units(self, path: str) -> str | None:
        """Return words about a use of a weight in which its entries are not from one unit to another."""
        uses = (site for site in self._makers[path] if site.kind.why_no_units)
        return next((f"{site.node.name!r} reads it too: {site.kind.why_no_units}" for site in uses), None)

    def _unmakeable(self, site: WeightSite) -> str | None:
        reason = _blocker(site)
        if reason is None and not has_own_bias(self._graph_module, site, self._shared):
            return "its bias is not the layer's alone"
        return reason

    def _is_plastic(self, path: str) -> str | None:
        """Return what is kept for each synapse of a weight already, None if nothing is."""
        state = kept_state(self._graph_module, path)
        if state is not None and (state.has_factors or state.target_strength is not None):
            return "its synapses have learning rates or target strengths already; expand the original first"
        return None

    def _names_channels(self, node: Node, inside: Set[Node]) -> str | None:
        """Return why an operation would not work with twice the channels, None if it would."""
        module = self._graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        rule = rule_for("units", node, module)
        layout = self._groups.values[node].layout
        if rule not in _ANY_NUMBER_OF_CHANNELS or node.target in _ACROSS_CHANNELS:
            return "which is made for a certain number of channels"
        if layout is None or len(layout.axes) != 1 or layout.labels.dim() != 1:
            return "where they do not lie along one axis"
        if module is not None and self._calls[str(node.target)] > 1 and _has_state(module):
            return "a module that is called more than once"
        if rule is layers.normalised:
            return _unnormalisable(module, layout.axes[0])
        if isinstance(module, nn.PReLU) and module.num_parameters > 1:
            return "which has a slope for each"
        if module is not None and _has_state(module) and not isinstance(module, nn.PReLU):
            return f"a {type(module).__name__}, which has parameters for a number of channels"
        if _samples_for_each(node, module):
            return "whose noise is sampled for each channel by itself; use nn.Dropout"
        if isinstance(module, DROPOUTS) and layout.axes[0].dims not in ((0,), (0, None)):
            return "which drops entries of them in another order"
        if rule is shapes.reshaped and _is_named(node, layout.axes[0].position):
            return "which names a number of channels; write -1"
        for source in node.all_input_nodes:
            if source not in inside and not self._is_neutral(source, is_arithmetic=rule in _ARITHMETIC):
                return f"together with {source.name!r}, which has no units that are known"
        return None

    def _is_neutral(self, source: Node, *, is_arithmetic: bool) -> bool:
        """Whether a node is a size, or a tensor of one entry; in arithmetic no size may count channels."""
        if source.op == "get_attr":
            held: object = self._graph_module
            for part in str(source.target).split("."):
                held = getattr(held, part)
            return not isinstance(held, torch.Tensor) or held.numel() == 1
        value = self._groups.values[source]
        if is_arithmetic:
            return value.number is None and value.size_of == 1
        return value.number is not None or (source.target is not getattr and _is_size(source))


def _unnormalisable(module: nn.Module | None, axis: Axis) -> str | None:
    """Return why a normalisation could not have twice the channels, None if it could."""
    is_plain = isinstance(module, _INSTANCE_NORMS) and not _has_state(module)
    if not isinstance(module, NORMS) and not is_plain:
        return "a normalisation that is not one of torch's modules for a number of channels"
    if axis.dims != (0,):
        return "which normalises the entries of a flattened map"
    if isinstance(module, nn.LayerNorm) and (len(module.normalized_shape) != 1 or axis.position != -1):
        return "which normalises other axes than theirs too"
    return None


def _samples_for_each(node: Node, module: nn.Module | None) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    noisy = isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout | nn.RReLU)
    return noisy or "rrelu" in name or ("dropout" in name and module is None)


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _blocker(site: WeightSite) -> str | None:
    if site.kind.is_compound:
        return f"a {site.kind.name} has several weights, whose sizes depend on each other"
    if site.kind.is_product:
        return f"it is a factor of {site.kind.name}, not the weight of a layer"
    if sum_behind(site.whole_weight_node) is not None or site.whole_path != site.parameter_path:
        return "its weight is the sum of sub-weights"
    if site.computation is not None:
        return f"the forward computes its weight ({site.computation.words}), whose shape would change"
    if site.operators:
        return "its weight is constrained or scaled already"
    return site.value_blocker


def _unreadable(reading: Reading) -> str | None:
    axis = run_of(reading)
    if axis is None or axis.dims not in ((0,), (0, None), (None, 0)):
        return "its input channels are not simply its units, or runs of them"
    return None


def run_of(reading: Reading) -> Axis | None:
    """Return the axis along which a weight reads units."""
    layout = reading.layout
    if layout is None or layout.labels.dim() != 1:
        return None
    return layout.axis_at(reading.site.kind.channel_axis)


def _is_named(node: Node, position: int) -> bool:
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], Node):
        return True  # sizes computed as a whole, with numbers in them that are not seen here
    size = list(sizes)[position]
    return isinstance(size, int) and size != -1


def _is_size(node: Node) -> bool:
    while True:
        if node.op == "call_method" and node.target in ("size", "dim", "numel"):
            return True
        if node.target is getattr:
            return node.args[1] in ("shape", "ndim")
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]


def expand(
    circuit: Circuit, groups: UnitGroups, lowering: Lowering, makers: Mapping[str, Sequence[WeightSite]]
) -> list[WeightSite]:
    """Rewrite a circuit in place; the model's function stays the same.

    A weight w from a unit becomes max(w, 0) from its excitatory and min(w, 0) from its inhibitory copy, and
    both copies have the weights onto the unit. So (w⁺ + w⁻) a = w a.

    Args:
        circuit: what belongs together, and can be expanded.
        groups: the units of the graph.
        lowering: of the graph.
        makers: the uses of each weight, by its path.

    Returns:
        The uses of the weights that were changed, which the caller lowers.
    """
    graph_module = lowering.graph_module
    split: dict[str, None] = {}
    for reading in circuit.readings:
        if reading.site.parameter_path not in split:
            split[reading.site.parameter_path] = None
            _split_columns(lowering, reading)
    for source in circuit.sources:
        _double_rows(lowering, makers[source.name][0])
        sign = torch.tensor([1.0, -1.0], dtype=torch.float32).repeat(source.count)
        state = bio_module_at(graph_module, source.name)
        state.sign = sign.to(state.weight.device)
        state.is_expanded = True
    for node in circuit.nodes:
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, NORMS):
            _double_norm(lowering, module)
        elif isinstance(module, DROPOUTS):
            _pair_dropout(lowering, node, module, groups)
    changed = dict.fromkeys([*split, *(source.name for source in circuit.sources)])
    return [site for path in changed for site in makers[path]]


def _split_columns(lowering: Lowering, reading: Reading) -> None:
    """Give a weight two input channels for each that it has, one per sign."""
    site, axis, layout = reading.site, run_of(reading), reading.layout
    parameter = lowering.graph_module.get_parameter(site.parameter_path)
    position, inner = site.kind.input_axis, 1
    if axis is not None and layout is not None and axis.dims == (0, None):
        inner = site.input_channels // layout.labels.numel()
    apart = parameter.detach().unflatten(position, (-1, inner))
    paired = torch.stack((apart.clamp(min=0), apart.clamp(max=0)), position + 1)
    lowering.parameters.replace(parameter, paired.flatten(position, position + 2))
    _double_sizes(lowering.graph_module.get_submodule(site.layer), "in_features", "in_channels")


def _double_rows(lowering: Lowering, site: WeightSite) -> None:
    """Give a layer each of its outputs twice, side by side."""
    layer = lowering.graph_module.get_submodule(site.layer)
    _double_parameter(
        lowering, lowering.graph_module.get_parameter(site.parameter_path), site.kind.output_axis
    )
    _double_parameter(lowering, layer._parameters.get("bias"))
    _double_sizes(layer, "out_features", "out_channels")


def _double_norm(lowering: Lowering, module: Any) -> None:
    """Give a normalisation twice the channels."""
    for name in ("weight", "bias"):
        _double_parameter(lowering, module._parameters.get(name))
    for name in ("running_mean", "running_var"):
        if module._buffers.get(name) is not None:
            module._buffers[name] = module._buffers[name].repeat_interleave(2)
    _double_sizes(module, "num_features", "num_channels")
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(2 * size for size in module.normalized_shape)


def _pair_dropout(lowering: Lowering, node: Node, module: Any, groups: UnitGroups) -> None:
    """Drop both copies of a unit together, by the random numbers that the unit itself would have had."""
    layout = groups.values[node].layout
    if layout is None:
        return
    training, share = lowering.read_of(node, "training"), lowering.read_of(node, "p")
    node.op, node.target = "call_function", drop_pairs
    node.args = (node.args[0] if node.args else node.kwargs["input"], training)
    node.kwargs = {
        "p": share,
        "kind": type(module).__name__.lower(),
        "channel_axis": layout.axes[0].position,
        "units": layout.labels.numel(),
    }


def _double_parameter(lowering: Lowering, parameter: nn.Parameter | None, axis: int = 0) -> None:
    if parameter is not None:
        lowering.parameters.replace(parameter, parameter.detach().repeat_interleave(2, axis))


def _double_sizes(module: nn.Module, *names: str) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, 2 * getattr(module, name))
