"""Give a connection several synapses: a layer's output ``y`` becomes ``pool_synapses(activation(y))``.

Two neurons are usually joined by more than one synapse. Each group of ``gamma`` neighbouring output
channels acts as the synapses of one connection: they are summed, and every member carries the sum on. With
``mode="sub-weights"`` the synapses are ``gamma`` weights of their own in place of one, ``weight`` becomes
``sum_sub_weights(weight, ...)``, and the function stays what it was.

Source: Hofmann, Becker, Tetzlaff, Mäder, "Concept transfer of synaptic diversity from biological to
artificial neural networks", Nature Communications 16 (2025), doi 10.1038/s41467-025-60078-9 (weight
splitting).

Deviations: ``gamma`` must divide the output channels, not the input's; samples of a batch never mix.
Sub-weights and ``rates="mean"`` are not in the reference package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from biofx.analysis.readouts import readout_nodes, readouts_in_doubt
from biofx.analysis.synapses import split_nodes
from biofx.config import option_from_config
from biofx.errors import OptionError
from biofx.graph.analysis_cache import unchanged
from biofx.layers.sites import find_sites
from biofx.model.graph_module import BioGraphModule
from biofx.operators.split_ops import pool_synapses
from biofx.option_names import named_option
from biofx.options import with_documented_options
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.remarks import Remark, done_already, missed, switched_off
from biofx.rewriting.scope import Scope
from biofx.rewriting.split_neighbours import (
    SplittableLayer,
    level_steps,
    pool_neighbours,
    why_not_neighbours,
    with_steps,
)
from biofx.rewriting.sub_weights import SUB_WEIGHTS, share_out_weights
from biofx.rewriting.weight_pass import unsupported


@with_documented_options
@dataclass(frozen=True, kw_only=True)
class SplitWeights(Pass):
    """Sum groups of neighbouring output channels and give each member the sum, or sum sub-weights."""

    name: ClassVar[str] = "split-weights"
    mechanism: ClassVar[str] = "splits"

    gamma: int = option_from_config("weight_splitting_Gamma", default=2)
    activation: Callable[[Any], Any] | str = option_from_config("weight_splitting_activation_function")
    mode: str = option_from_config("weight_splitting_mode")
    rates: str = option_from_config("weight_splitting_rates")
    seed: int = option_from_config("seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = [self.mode, *(dict(entry.options).get("mode") for entry in self.overrides)]
        if SUB_WEIGHTS not in modes:  # nothing is sampled
            object.__setattr__(self, "seed", 0)

    def candidates(self, graph_module: BioGraphModule) -> Iterator[SplittableLayer | Remark]:
        """Yield each layer with a weight."""
        with unchanged():
            sites = find_sites(graph_module)
            readout, in_doubt = readout_nodes(graph_module), readouts_in_doubt(graph_module)
            split = split_nodes(graph_module)
        for site in sites.found:
            if not site.is_further:
                reason = why_not_neighbours(site, graph_module, readout, in_doubt)
                yield SplittableLayer(site, site.node in split, reason)
        yield from unsupported(sites)

    def rewrite_node(self, candidate: SplittableLayer, options: Pass) -> Iterator[Remark]:
        """Sum the groups of a layer's output channels."""
        site = candidate.site
        if self.gamma > 1 and self.mode == SUB_WEIGHTS:
            return  # which needs all uses of a weight
        if candidate.is_split:
            yield done_already(site.node, site.layer, site.describe("its output is split already"))
        elif self.gamma < 2:
            yield switched_off(site.node, site.layer, site.describe(f"it is off ({self._named_gamma})"))
        elif candidate.reason is not None:
            yield missed(site.node, site.layer, site.describe(candidate.reason))
        elif site.output_channels % self.gamma:
            reason = f"Γ does not divide its {site.output_channels} output channels ({self._named_gamma})"
            yield missed(site.node, site.layer, reason, gamma=self.gamma, channels=site.output_channels)
        else:
            yield pool_neighbours(site, self.gamma, self.activation)

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Split each selected layer.

        Raises:
            OptionError: gamma divides the output channels of none of the layers it is meant for, or two uses
                of one weight are given different options.
        """
        earlier = set(graph_module.graph.find_nodes(op="call_function", target=pool_synapses))
        remarks = list(super().rewrite(graph_module, scope))
        remarks += self._share_out(graph_module, scope)
        indivisible = [r for r in remarks if r.kind == "missed" and "channels" in r.details]
        if indivisible and all(remark.kind == "missed" for remark in remarks):
            found = ", ".join(f"{r.layer or r.node} has {r.details['channels']}" for r in indivisible)
            raise OptionError(
                f"{self.name}: expected a {named_option(self.name, 'gamma')} that divides the output "
                f"channels of a layer, found {self}, "
                f"which divides none: {found}; choose a divisor, or leave these layers out"
            )
        with unchanged():
            levelled, left = self._new_pools(graph_module, scope, earlier)
            remarks = list(with_steps(graph_module, remarks, left, levelled))
        yield from remarks
        if levelled:
            yield from level_steps(graph_module, scope, levelled)

    @property
    def _named_gamma(self) -> str:
        return named_option(self.name, "gamma", self.gamma)

    def _share_out(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Put sub-weights in the place of the weights that are meant to have some."""

        def options_at(node: Node, layer: str) -> SplitWeights | None:
            options = scope.variant(self, node, layer)
            is_meant = options.mode == SUB_WEIGHTS and options.gamma > 1
            return options if is_meant and scope.why_not(node, layer) is None else None

        yield from share_out_weights(graph_module, scope, options_at)

    def _new_pools(
        self, graph_module: BioGraphModule, scope: Scope, earlier: set[Node]
    ) -> tuple[list[Node], list[Node]]:
        """Return the pools that were made now, first those meant to take the steps of plain layers."""
        layer_of = {site.node: site.layer for site in find_sites(graph_module).found}
        pools: tuple[list[Node], list[Node]] = ([], [])
        for pool in graph_module.graph.find_nodes(op="call_function", target=pool_synapses):
            node = scope.changes.created_for(pool)
            layer = None if pool in earlier or node is None else layer_of.get(node)
            if node is not None and layer is not None:
                pools[scope.variant(self, node, layer).rates != "mean"].append(pool)
        return pools
