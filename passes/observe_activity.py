"""Watch how active every unit is: a unit's output passes through ``observe_activity`` on its way.

Active neurons keep their synapses; to know which ones are active, their output must be seen.

Source: Hofmann, Becker, Tetzlaff, Mäder, "Concept transfer of synaptic diversity from biological to
artificial neural networks", Nature Communications 16 (2025), doi 10.1038/s41467-025-60078-9
(activity-dependent learning rates).

Deviations: the output is observed where it is computed, behind the unit's nonlinearity and in training mode
only, instead of by running the layer a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from biofx.analysis.synapses import unit_output
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite, fold_behind
from biofx.model.graph_module import BioGraphModule
from biofx.operators.rate_ops import observe_activity
from biofx.plasticity.model_states import bio_module_at, bio_module_path
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.remarks import Remark, applied, done_already, missed
from biofx.rewriting.weight_pass import LayerUse, unsupported


@dataclass(frozen=True)
class ObservableUnits(LayerUse):
    """The units of a layer, and where their activity can be observed."""

    output: Node
    """The node whose output is observed."""
    nonlinearity: str
    """What it is called, empty for a layer without a nonlinearity, whose own output it then is."""


@dataclass(frozen=True, kw_only=True)
class ObserveActivity(Pass):
    """Keep a running mean of the magnitude of each unit's output, for rules that depend on activity."""

    name: ClassVar[str] = "observe-activity"
    mechanism: ClassVar[str] = "activity"
    after: ClassVar[tuple[str, ...]] = ("split-weights", "constrain-signs", "scale-gradients")

    def candidates(self, graph_module: BioGraphModule) -> Iterator[ObservableUnits | Remark]:
        """Yield the units of each layer."""
        sites = find_sites(graph_module)
        for site in sites.found:
            if not site.is_further:
                yield ObservableUnits(site, *unit_output(site.node, graph_module))
        yield from unsupported(sites)

    def rewrite_node(self, candidate: ObservableUnits, options: Pass) -> Remark:
        """Observe the units of a layer behind its nonlinearity."""
        site, output = candidate.site, candidate.output
        if site.why_no_channels is not None:
            return missed(site.node, site.layer, site.describe(site.why_no_channels))
        if any(user.target is observe_activity for user in output.users):
            return done_already(site.node, site.layer, "its activity is observed already")
        if fold_behind(site.whole_weight_node) is not None:
            return missed(site.node, site.layer, "its weight is folded already; observe it before")
        _observe(site, output)
        behind = (
            f"behind {candidate.nonlinearity}"
            if candidate.nonlinearity
            else "as they are, for want of a nonlinearity"
        )
        return applied(site.node, site.layer, f"{site.output_channels} units observed {behind}")


def _observe(site: WeightSite, output: Node) -> None:
    graph, stem, users = output.graph, site.node.name, list(output.users)
    model: Any = graph.owning_module
    state = bio_module_at(model, site.parameter_path)
    if state.activity is None:
        state.activity = torch.full((site.output_channels,), -1.0, device=site.parameter.device)
    stack = {key: value for key, value in site.node.meta.items() if key == "nn_module_stack"}
    path = bio_module_path(site.parameter_path)
    with graph.inserting_after(output):
        observed = graph.create_node("call_function", observe_activity, (output,), {}, f"{stem}_observed")
    with graph.inserting_before(observed):
        activity = graph.create_node("get_attr", f"{path}.activity", name=f"{stem}_activity")
        training = graph.create_node("get_attr", f"{path}.training", name=f"{stem}_training")
    observed.args = (output, activity, training)
    observed.kwargs = {"channel_axis": site.kind.channel_axis}
    for node in (activity, training, observed):
        node.meta = dict(stack)
    for user in users:
        user.replace_input_with(output, observed)
