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
from typing import ClassVar

import torch
from torch.fx import Node

from biofx.analysis.dataflow import unit_output
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite, fold_behind
from biofx.model.graph_module import BioGraphModule
from biofx.operators import synapse_ops as ops
from biofx.plasticity.model_states import bio_module_at, bio_module_path
from biofx.rewriting.pass_base import Pass, Scope
from biofx.rewriting.report import Remark, applied, missed


@dataclass(frozen=True, kw_only=True)
class ObserveActivity(Pass):
    """Keep a running mean of the magnitude of each unit's output, for rules that depend on activity."""

    name: ClassVar[str] = "observe-activity"
    mechanism: ClassVar[str] = "activity"
    after: ClassVar[tuple[str, ...]] = ("split-weights", "constrain-signs", "scale-gradients")

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Observe each selected layer behind its nonlinearity."""
        sites = find_sites(graph_module)
        for site in sites.found:
            options = scope.options(self, site.node, site.layer)
            output, activation = unit_output(site.node, graph_module)
            if isinstance(options, str):
                yield missed(site.node, site.layer, site.told(options))
            elif site.why_no_channels is not None:
                yield missed(site.node, site.layer, site.told(site.why_no_channels))
            elif any(user.target is ops.observe_activity for user in output.users):
                yield missed(site.node, site.layer, "its activity is observed already")
            elif fold_behind(site.weight_node) is not None:
                yield missed(site.node, site.layer, "its weight is folded already; observe it before")
            else:
                self._observe(graph_module, site, output)
                behind = f"behind {activation}" if activation else "as they are, for want of a nonlinearity"
                yield applied(site.node, site.layer, f"{site.output_channels} units observed {behind}")
        for bystander in sites.bystanders:
            yield missed(bystander.node, bystander.layer, bystander.reason)

    def _observe(self, graph_module: BioGraphModule, site: WeightSite, output: Node) -> None:
        state = bio_module_at(graph_module, site.parameter_path)
        if state.activity is None:
            state.activity = torch.full((site.output_channels,), -1.0, device=site.parameter.device)
        graph, stem, users = output.graph, site.node.name, list(output.users)
        stack = {key: value for key, value in site.node.meta.items() if key == "nn_module_stack"}
        path = bio_module_path(site.parameter_path)
        with graph.inserting_after(output):
            observed = graph.create_node(
                "call_function", ops.observe_activity, (output,), {}, f"{stem}_observed"
            )
        with graph.inserting_before(observed):
            activity = graph.create_node("get_attr", f"{path}.activity", name=f"{stem}_activity")
            training = graph.create_node("get_attr", f"{path}.training", name=f"{stem}_training")
        observed.args = (output, activity, training)
        observed.kwargs = {"channel_axis": site.kind.channel_axis}
        for node in (activity, training, observed):
            node.meta = dict(stack)
        for user in users:
            user.replace_input_with(output, observed)
