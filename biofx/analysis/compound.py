"""The units inside recurrent layers and attention, which several weights of one node read and make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biofx.analysis.flow import Call, Flow
from biofx.analysis.layout import Axis, Layout
from biofx.layers.layer_kinds import ATTENTION
from biofx.layers.weight_site import WeightSite

if TYPE_CHECKING:
    from biofx.analysis.analysis import Analysis


def compound_layer(call: Call, sites: list[WeightSite], analysis: Analysis) -> Flow:
    """Note what each weight of a layer with several reads, and return what the layer gives out."""
    if sites[0].kind is ATTENTION:
        return _attention(call, {site.role: site for site in sites}, analysis)
    return _recurrent(call, sites, analysis)


def _attention(call: Call, sites: dict[str, WeightSite], analysis: Analysis) -> Flow:
    """The values' units are read by the output projection; queries and keys are compared."""
    inputs = {name: call.argument(place, name) for place, name in enumerate(("query", "key", "value"))}
    joint = sites.get("query_key_value")
    if joint is not None:
        analysis.read(joint, inputs["value"], -1)
        query, key, value = _made(analysis, joint, joint.parameter.shape[0]).chunk(3)
    else:
        made = []
        for name, source in inputs.items():
            analysis.read(sites[name], source, -1)
            made.append(_made(analysis, sites[name], sites[name].parameter.shape[0]))
        query, key, value = made
    analysis.compare(query, key)
    output = sites["attention_output"]
    analysis.read_units(output, value, nonnegative=False)
    labels = _made(analysis, output, output.output_channels)
    attended = Flow(layout=Layout.along(labels, -1), rank=_rank(call.flow(inputs["query"])))
    return Flow(parts=(attended, Flow(nonnegative=True)))


def _recurrent(call: Call, sites: list[WeightSite], analysis: Analysis) -> Flow:
    """Each unit is read one step later by its own layer, and by the layer above."""
    source = call.argument(0, "input")
    mode = str(call.node.kwargs.get("mode", getattr(call.module, "mode", "")))
    nonnegative = mode == "RNN_RELU"
    below: Tensor | None = None
    speaking: list[Tensor] = []
    inside: list[Tensor] = []
    for layer in range(1 + max(site.slot.layer for site in sites)):
        outputs = []
        for direction in range(1 + max(site.slot.direction for site in sites)):
            own = {s.role: s for s in sites if (s.slot.layer, s.slot.direction) == (layer, direction)}
            cells = spoken = _made(analysis, own["hidden"], own["hidden"].output_channels)
            if "projection" in own:
                spoken = _made(analysis, own["projection"], own["projection"].output_channels)
                analysis.read_units(own["projection"], cells, nonnegative=False)
            analysis.read_units(own["hidden"], spoken, nonnegative=nonnegative)
            if below is None:
                analysis.read(own["input"], source, -1)
            else:
                analysis.read_units(own["stacked"], below, nonnegative=nonnegative)
            outputs.append(spoken)
            inside.append(cells)
        speaking += outputs
        below = torch.cat(outputs)
    rank = _rank(call.flow(source))
    final = below if below is not None else torch.empty(0, dtype=torch.int64)
    output = Flow(layout=Layout.along(final, -1), rank=rank, nonnegative=nonnegative)
    states = [_state(units, nonnegative=nonnegative, unbatched=rank == 2) for units in (speaking, inside)]
    return Flow(parts=(output, Flow(parts=tuple(states)) if mode == "LSTM" else states[0]))


def _rank(flow: Flow) -> int:
    """Return the rank of a sequence of vectors, with a batch axis where nothing tells otherwise."""
    return 3 if flow.rank is None else flow.rank


def _state(units: list[Tensor], *, nonnegative: bool, unbatched: bool) -> Flow:
    """Return the flow of the last state: one row of units per layer and direction."""
    front = -2 if unbatched else -3
    layout = Layout(torch.stack(units), (Axis(front, (0,)), Axis(-1, (1,))))
    return Flow(layout=layout, rank=-front, nonnegative=nonnegative)


def _made(analysis: Analysis, site: WeightSite, count: int) -> Tensor:
    return analysis.made(site.parameter_path, count, -1).labels
