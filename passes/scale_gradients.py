"""Give every synapse a learning rate of its own: ``weight`` becomes ``scale_gradient(weight, factors)``.

Synapses onto one neuron differ in how fast they change; so may weights.
Source: Hofmann, Becker, Tetzlaff, Mäder, "Concept transfer of synaptic diversity from biological to
artificial neural networks", Nature Communications 16 (2025), doi 10.1038/s41467-025-60078-9 (fuzzy learning
rates). Distributions: :mod:`biofx.operators.rate_sampling`, changing :mod:`biofx.plasticity.rate_rules`.

Deviations: the factor acts inside the graph, on the gradient, so the training loop has nothing to call.
Optimizers that are indifferent to the scale of a gradient (Adam and its family) undo a constant factor;
use SGD, or let ``biofx.attach`` scale their updates instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from biofx.analysis.observation import OrderOfExecution
from biofx.config import FROM_SEED, check_drawn_again, option_from_config
from biofx.layers.weight_site import Sites, Weight, WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.rate_ops import scale_gradient, scale_gradient_by_seed
from biofx.operators.rate_sampling import CHANGING, Distribution, rate_sampling, sampling_options
from biofx.options import with_documented_options
from biofx.plasticity.model_states import bio_module_path, is_taken, state_of
from biofx.rewriting.remarks import Remark, applied, done_already, missed
from biofx.rewriting.scope import Scope
from biofx.rewriting.weight_pass import WeightPass, WeightUses, show_parameters, weights_and_parameters


@with_documented_options
@dataclass(frozen=True, kw_only=True)
class ScaleGradients(WeightPass):
    """Multiply each weight's gradient by its own factor."""

    name: ClassVar[str] = "scale-gradients"
    mechanism: ClassVar[str] = "rates"
    after: ClassVar[tuple[str, ...]] = ("split-weights", "mask-weights", "constrain-signs")

    nu: float = option_from_config("fuzzy_learning_rate_factor_nu")
    distribution: Distribution = option_from_config("fuzzy_lr_distribution")
    low: float = option_from_config("fuzzy_lr_min")
    high: float = option_from_config("fuzzy_lr_max")
    log_low: float = option_from_config("fuzzy_lr_log_min")
    log_high: float = option_from_config("fuzzy_lr_log_max")
    granularity: str = option_from_config("fuzzy_lr_granularity")
    dtype: str = option_from_config("fuzzy_lr_dtype")
    parameters: str = option_from_config("fuzzy_lr_parameters")
    seed: int = option_from_config("seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == FROM_SEED:
            check_drawn_again(f"{self.name}: dtype", self.distribution)

    def survey(self, graph_module: BioGraphModule, scope: Scope) -> OrderOfExecution:
        """Find the places of weights in the order of execution."""
        return OrderOfExecution.of(graph_module)

    def weights(self, sites: Sites, scope: Scope) -> list[Weight]:
        """Return the weights with whatever else reads them, and where all are meant the other parameters."""
        return weights_and_parameters(
            sites, lambda node, layer: scope.variant(self, node, layer).parameters == "all"
        )

    def reason_against(self, site: WeightSite, survey: OrderOfExecution) -> Remark | None:
        """Leave alone what is scaled already, would be scaled by 1, or is frozen."""
        if site.is_scaled:
            return done_already(site.node, site.layer, "its gradient is scaled already")
        reason = self._reason_against(site, survey.region_of_unknown(site))
        return None if reason is None else missed(site.node, site.layer, reason)

    def _reason_against(self, site: WeightSite, region: str | None) -> str | None:
        if self.distribution is Distribution.LAYER_ADAPTIVE and region:
            return f"its place in the order of execution is not known: Python calls {region!r}"
        if not self._scales:
            return f"every factor would be 1 ({self.distribution.value}, nu={self.nu:g})"
        if not site.parameter.requires_grad:
            return "its weight is frozen (requires_grad is False)"
        if site.parameter.is_meta:
            return "its weight is on the meta device and has no values"
        if site.lowering_blocker is None and is_taken(site.parameter_path):
            return f"plasticity states use its name, {site.parameter_path!r}, for something else"
        if site.is_computed and self.distribution in CHANGING:
            return f"a parametrization computes it, and {self.distribution.value} factors follow a parameter"
        if site.is_computed and self.dtype == FROM_SEED:
            return "a parametrization computes it, and 'seed' factors take a parameter; use 'float32'"
        return site.lowering_blocker

    @property
    def _scales(self) -> bool:
        return self.distribution is not Distribution.BASELINE and self.nu != 0

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Scale the gradient of each selected weight, and where all parameters are meant, theirs."""

        def is_meant(node: Node, layer: str) -> bool:
            options = scope.variant(self, node, layer)
            return options.parameters == "all" and options._scales

        if "all" in (self.parameters, *(dict(entry.options).get("parameters") for entry in self.overrides)):
            show_parameters(graph_module, scope, is_meant)
        yield from super().rewrite(graph_module, scope)

    def rewrite_node(self, candidate: WeightUses, options: WeightPass) -> Iterator[Remark]:
        """Draw the factors of a weight, unless another use of it has them already, and insert them."""
        weight, lowering = candidate.survey.placed(candidate.weight), candidate.lowering
        source = self._sampled_from(weight)
        state, sampling = state_of(lowering.graph_module, weight), rate_sampling(**source)
        if not state.has_factors:
            state.depth = weight.depth
            bounds = {"fuzzy_lr_min": source["low"], "fuzzy_lr_max": source["high"]}
            state.config = state.config.replace(**bounds, fuzzy_lr_dtype=self.dtype)
            state.start_factors(sampling, self.dtype, weight.parameter)
        if state.is_drawn and state.rate_sampling != sampling:
            reason = "its weight has factors from another draw already"
            yield from (done_already(site.node, site.layer, site.describe(reason)) for site in weight.sites)
            return
        factors: Any = state.fuzzy_learning_rate_parameters
        state.scaled_in_graph = True
        for site in weight.sites:
            lowering.lower(site)
        places = [site.at_parameter for site in weight.sites]
        if state.is_drawn:
            lowering.wrap_weight(places, scale_gradient_by_seed, None, "scaled", **source)
        else:
            kept = f"{bio_module_path(weight.path)}.fuzzy_learning_rate_parameters"
            lowering.wrap_weight(places, scale_gradient, (kept, "rates"), "scaled")
        mean, std = factors.float().mean().item(), factors.float().std(correction=0).item()
        form = "" if self.dtype == "float32" else f" in {self.dtype}"
        form = " drawn from their seed at each backward" if state.is_drawn else form
        told = f"{factors.numel()} factors{form}, {self.distribution.value}, mean {mean:.3f}, std {std:.3f}"
        told += f"; one set for {len(places)} uses of the weight" if len(places) > 1 else ""
        found = {"factors": factors.numel(), "mean": mean, "std": std}
        yield from (applied(site.node, site.layer, site.describe(told), **found) for site in weight.sites)

    def _sampled_from(self, weight: Weight) -> dict[str, Any]:
        """Return what the factors of a weight are sampled from, as the graph says it."""
        return sampling_options(
            self.distribution,
            **{name: getattr(self, name) for name in ("nu", "low", "high", "log_low", "log_high", "seed")},
            path=weight.path,
            depth=weight.depth,
            granularity=self.granularity,
            output_axis=weight.sites[0].kind.output_axis,
        )
