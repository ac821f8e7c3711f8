"""Give a connection several synapses: a layer's output ``y`` becomes ``pool_synapses(activation(y))``.

Two neurons are usually joined by more than one synapse. Each group of ``gamma`` neighbouring output
channels acts as the synapses of one connection: they are summed, and every member carries the sum on.

Source: Hofmann, Becker, Tetzlaff, Mäder, "Concept transfer of synaptic diversity from biological to
artificial neural networks", Nature Communications 16 (2025), doi 10.1038/s41467-025-60078-9 (weight
splitting).

Deviations: ``gamma`` must divide the output channels, not the input's; samples of a batch never mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from biofx.analysis.readouts import readout_nodes
from biofx.analysis.synapses import split_nodes
from biofx.callables import identity
from biofx.config import option_from_config
from biofx.errors import OptionError
from biofx.graph.printing import function_name
from biofx.graph.regions import region_of_nodes
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.split_ops import pool_synapses
from biofx.options import with_documented_options
from biofx.rewriting.activation import insert_activation
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.remarks import Remark, applied, done_already, missed, switched_off
from biofx.rewriting.scope import Scope
from biofx.rewriting.weight_pass import LayerUse, unsupported


@dataclass(frozen=True)
class SplittableLayer(LayerUse):
    """A layer whose output channels may be summed."""

    is_split: bool
    """Whether its output is split already."""
    reason: str | None
    """Why it cannot be split, whatever the options; None if it can."""


@with_documented_options
@dataclass(frozen=True, kw_only=True)
class SplitWeights(Pass):
    """Sum groups of neighbouring output channels and give each member the sum."""

    name: ClassVar[str] = "split-weights"
    mechanism: ClassVar[str] = "splits"

    gamma: int = option_from_config("weight_splitting_Gamma", default=2)
    activation: Callable[[Any], Any] | str = option_from_config("weight_splitting_activation_function")

    def candidates(self, graph_module: BioGraphModule) -> Iterator[SplittableLayer | Remark]:
        """Yield each layer with a weight."""
        sites = find_sites(graph_module)
        readout, split = readout_nodes(graph_module), split_nodes(graph_module)
        for site in sites.found:
            yield SplittableLayer(site, site.node in split, _reason_against(site, graph_module, readout))
        yield from unsupported(sites)

    def rewrite_node(self, candidate: SplittableLayer, options: Pass) -> Remark:
        """Sum the groups of a layer's output channels."""
        site = candidate.site
        if candidate.is_split:
            return done_already(site.node, site.layer, site.describe("its output is split already"))
        if self.gamma < 2:
            return switched_off(site.node, site.layer, site.describe(f"gamma={self.gamma} is off"))
        if candidate.reason is not None:
            return missed(site.node, site.layer, site.describe(candidate.reason))
        if site.output_channels % self.gamma:
            reason = f"gamma={self.gamma} does not divide its {site.output_channels} output channels"
            return missed(site.node, site.layer, reason, gamma=self.gamma, channels=site.output_channels)
        return self._split(site)

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Split each selected layer.

        Raises:
            OptionError: gamma divides the output channels of none of the layers it is meant for.
        """
        remarks = list(super().rewrite(graph_module, scope))
        indivisible = [remark for remark in remarks if remark.kind == "missed" and "gamma" in remark.details]
        if indivisible and all(remark.kind == "missed" for remark in remarks):
            found = ", ".join(f"{r.layer or r.node} has {r.details['channels']}" for r in indivisible)
            raise OptionError(
                f"{self.name}: expected a gamma that divides the output channels of a layer, found {self}, "
                f"which divides none: {found}; choose a divisor, or leave these layers out"
            )
        yield from remarks

    def _split(self, site: WeightSite) -> Remark:
        users = list(site.node.users)
        activated = insert_activation(site, self.activation)
        with site.node.graph.inserting_after(activated):
            pooled = site.node.graph.create_node(
                "call_function",
                pool_synapses,
                (activated,),
                {"gamma": self.gamma, "channel_axis": site.kind.channel_axis},
                f"{site.node.name}_pooled",
            )
        pooled.meta = {key: value for key, value in site.node.meta.items() if key == "nn_module_stack"}
        for user in users:
            user.replace_input_with(site.node, pooled)
        groups = site.output_channels // self.gamma
        described = "" if self.activation is identity else f" after {function_name(self.activation)}"
        message = (
            f"{groups} groups of {self.gamma} of its {site.output_channels} output channels summed{described}"
        )
        return applied(
            site.node, site.layer, message, groups=groups, gamma=self.gamma, channels=site.output_channels
        )


def _reason_against(site: WeightSite, graph_module: BioGraphModule, readout: Set[Node]) -> str | None:
    if site.kind.why_no_units:
        return site.kind.why_no_units
    if not site.parameter.numel():
        return site.lowering_blocker or "it has no weights"
    if site.why_no_channels is not None:
        return f"{site.why_no_channels}; only those of a Linear or a convolution are split"
    if getattr(graph_module.get_submodule(site.layer), "last_module_token", False):
        return "it is marked as the last module"
    if not site.node.users:
        return "nothing reads its output"
    if site.node in readout and (region := region_of_nodes(graph_module.graph).get(site.node)):
        return f"whether it is an output layer is not known: Python calls {region!r} and what follows it"
    if site.node in readout:
        return "it is an output layer: no weights between it and the model's output"
    return None
