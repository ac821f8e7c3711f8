"""Fold the synapses of a connection into one: ``pool_synapses(linear(x, w))`` sums over ``w`` instead.

The synapses of a connection act together: what arrives is their sum. So the sum can be taken over the weights
instead of over what they transmit, and one value per connection be carried to the next layer, which sums its
weights for the members that would have brought it the same. The function stays what it was, and so do the
synapses: each keeps its own weight, sign, learning rate and gradient. What is saved is work.

Source: linearity of a layer in its weight. Nothing of the biology is changed.

Deviations: sums of weights are rounded differently from sums of outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from biofx.layers.sites import find_sites
from biofx.model.graph_module import BioGraphModule
from biofx.rewriting.folding import Folding, FoldPlan
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.remarks import Remark
from biofx.rewriting.scope import Scope


@dataclass(frozen=True, kw_only=True)
class FoldSplits(Pass):
    """Take the sums over synapses out of the activations and into the weights on both sides."""

    name: ClassVar[str] = "fold-splits"
    after: ClassVar[tuple[str, ...]] = (
        *("split-weights", "mask-weights", "constrain-signs", "scale-gradients", "observe-activity"),
    )

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Fold each pool of synapses, as far as what it repeats is carried."""
        sites = find_sites(graph_module)
        reasons = {site.node: scope.why_not(site.node, site.layer) for site in sites.found}
        plan = FoldPlan(graph_module, sites, {node: reason for node, reason in reasons.items() if reason})
        yield from list(plan.remarks())  # before the nodes that they are about are erased
        Folding(graph_module, plan, scope.rewriting).run()
