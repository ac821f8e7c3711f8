"""Turn each unit of a circuit into an excitatory and an inhibitory copy, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from biofx.analysis.analysis import Reading
from biofx.analysis.groups import UnitGroups
from biofx.layers.lowering import Lowering
from biofx.layers.weight_site import WeightSite
from biofx.operators.sign_ops import drop_pairs
from biofx.plasticity.model_states import bio_module_at
from biofx.rewriting.expandable import DROPOUTS, NORMS, Circuit, run_of


def expand(
    circuit: Circuit, groups: UnitGroups, lowering: Lowering, makers: Mapping[str, Sequence[WeightSite]]
) -> list[WeightSite]:
    """Rewrite a circuit in place; the model's function stays what it is.

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
    site, axis = reading.site, run_of(reading)
    parameter = lowering.graph_module.get_parameter(site.parameter_path)
    weight, position = parameter.detach(), site.kind.input_axis
    units = 1 if axis is None or reading.layout is None else reading.layout.labels.numel()
    channels = weight.shape[position]
    run = 1 if axis is None else site.input_channels // units
    inner = run if axis is not None and axis.dims == (0, None) else 1
    apart = weight.unflatten(position, (channels // inner, inner))
    paired = torch.stack((apart.clamp(min=0), apart.clamp(max=0)), position + 1)
    lowering.parameters.replace(parameter, paired.flatten(position, position + 2))
    owner: Any = lowering.graph_module.get_submodule(site.layer)
    name = "in_features" if site.kind.kernel_axes == 0 else "in_channels"
    if hasattr(owner, name):
        setattr(owner, name, 2 * getattr(owner, name))


def _double_rows(lowering: Lowering, site: WeightSite) -> None:
    """Give a layer each of its outputs twice, side by side."""
    parameter = lowering.graph_module.get_parameter(site.parameter_path)
    rows = site.kind.output_axis
    lowering.parameters.replace(parameter, _twice(parameter.detach(), rows))
    owner: Any = lowering.graph_module.get_submodule(site.layer)
    bias = owner._parameters.get("bias")
    if bias is not None:
        lowering.parameters.replace(bias, _twice(bias.detach(), 0))
    name = "out_features" if site.kind.kernel_axes == 0 else "out_channels"
    if hasattr(owner, name):
        setattr(owner, name, 2 * getattr(owner, name))


def _double_norm(lowering: Lowering, module: Any) -> None:
    """Let a normalisation have twice the channels."""
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if parameter is not None:
            lowering.parameters.replace(parameter, _twice(parameter.detach(), 0))
    for name in ("running_mean", "running_var"):
        if module._buffers.get(name) is not None:
            module._buffers[name] = _twice(module._buffers[name], 0)
    for name in ("num_features", "num_channels"):
        if hasattr(module, name):
            setattr(module, name, 2 * getattr(module, name))
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(2 * size for size in module.normalized_shape)


def _pair_dropout(lowering: Lowering, node: Node, module: Any, groups: UnitGroups) -> None:
    """Let both copies of a unit be dropped together, by the numbers that the unit would have drawn."""
    layout = groups.flows[node].layout
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


def _twice(values: Tensor, axis: int) -> Tensor:
    return values.repeat_interleave(2, axis)
