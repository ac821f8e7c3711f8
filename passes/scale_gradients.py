"""Give every synapse a learning rate of its own: ``weight`` becomes ``scale_gradient(weight, factors)``.

Synapses onto one neuron differ in how fast they change; so may weights.

Source: Hofmann, Becker, Tetzlaff, Mäder, "Concept transfer of synaptic diversity from biological to
artificial neural networks", Nature Communications 16 (2025), doi 10.1038/s41467-025-60078-9 (fuzzy
learning rates); the distributions are in :mod:`biofx.plasticity.distributions` and, those that change during
training, in :mod:`biofx.plasticity.rate_rules`.

Deviations: the factor acts inside the graph, on the gradient, so the training loop has nothing to call.
Optimizers that are indifferent to the scale of a gradient (Adam and its family) undo a constant factor;
use SGD, or let ``biofx.attach`` scale their updates instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from biofx.config import FROM_SEED, check_drawn_again, option_from_config
from biofx.graph.regions import region_of_nodes
from biofx.layers.lowering import Lowering
from biofx.layers.norm_sites import NormSite, find_norms, lower_norm
from biofx.layers.sites import find_sites
from biofx.layers.unusual_weights import obstacle_to_values
from biofx.layers.weight_site import Sites, Weight, WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators import synapse_ops as ops
from biofx.operators.distributions import CHANGING, Distribution
from biofx.operators.randomness import generator_for
from biofx.operators.rate_draws import PURPOSE, rate_draw, told_of_place
from biofx.operators.rate_ops import scale_gradient_by_seed
from biofx.options import with_documented_options
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import bio_module_path, is_taken, state_of
from biofx.plasticity.rate_rules import initial_factors
from biofx.rewriting.pass_base import Scope
from biofx.rewriting.report import Remark, applied, missed
from biofx.rewriting.weight_pass import WeightPass


@with_documented_options
@dataclass(frozen=True, kw_only=True)
class ScaleGradients(WeightPass):
    """Multiply each weight's gradient by its own factor."""

    name: ClassVar[str] = "scale-gradients"
    mechanism: ClassVar[str] = "rates"
    after: ClassVar[tuple[str, ...]] = ("split-weights", "constrain-signs")

    nu: float = option_from_config("fuzzy_learning_rate_factor_nu")
    distribution: Distribution = option_from_config("fuzzy_lr_distribution")
    low: float = option_from_config("fuzzy_lr_min")
    high: float = option_from_config("fuzzy_lr_max")
    granularity: str = option_from_config("fuzzy_lr_granularity")
    dtype: str = option_from_config("fuzzy_lr_dtype")
    parameters: str = option_from_config("fuzzy_lr_parameters")
    seed: int = option_from_config("seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == FROM_SEED:
            check_drawn_again(f"{self.name}: dtype", self.distribution)

    def survey(self, graph_module: BioGraphModule, scope: Scope) -> Mapping[Node, str]:
        """Find the nodes whose place in the order of execution is not known."""
        return region_of_nodes(graph_module.graph)

    def show(self, graph_module: BioGraphModule, scope: Scope) -> None:
        """Lower the layers and normalisations whose biases and gains are meant too."""
        if not self._means_all:
            return
        lowering = Lowering(graph_module)
        for site in find_sites(graph_module).found:
            if site.barrier is None and self._is_shown(site, graph_module, scope):
                lowering.lower(site)
        for norm in find_norms(graph_module):
            if norm.obstacle is None and self._is_shown(norm, graph_module, scope):
                lower_norm(lowering, norm)

    def _is_shown(self, site: WeightSite | NormSite, graph_module: BioGraphModule, scope: Scope) -> bool:
        options = scope.options(self, site.node, site.layer)
        if site.node.op != "call_module" or isinstance(options, str) or options.parameters != "all":
            return False
        called = graph_module.get_submodule(str(site.node.target))
        scales = options.distribution is not Distribution.BASELINE and options.nu != 0
        held = [entry for entry in called.parameters() if entry.requires_grad and not entry.is_meta]
        return scales and any(obstacle_to_values(entry) is None for entry in held)

    def candidates(self, sites: Sites, scope: Scope) -> list[Weight]:
        """Return the weights with all that reads them, and where all are meant the other parameters."""
        weights = sites.weights_and_reads(directly=False)
        if not self._means_all:
            return weights
        known = {id(weight.parameter) for weight in weights}
        return [
            weight
            for weight in sites.weights_and_reads(directly=True)
            if id(weight.parameter) in known
            or any(scope.variant(self, site.node, site.layer).parameters == "all" for site in weight.sites)
        ]

    @property
    def _means_all(self) -> bool:
        return "all" in (
            self.parameters,
            *(dict(entry.options).get("parameters") for entry in self.overrides),
        )

    def reason_against(self, site: WeightSite, survey: Mapping[Node, str]) -> str | None:
        """Leave alone what is scaled already, would be scaled by 1, or is frozen."""
        if site.is_scaled:
            return "its gradient is scaled already"
        if self.distribution is Distribution.LAYER_ADAPTIVE and survey.get(site.node):
            return f"its place in the order of execution is not known: Python calls {survey[site.node]!r}"
        if self.distribution is Distribution.BASELINE or self.nu == 0:
            return f"every factor would be 1 ({self.distribution.value}, nu={self.nu:g})"
        if not site.parameter.requires_grad:
            return "its weight is frozen (requires_grad is False)"
        if site.parameter.is_meta:
            return "its weight is on the meta device and has no values"
        if site.barrier is None and is_taken(site.parameter_path):
            return f"plasticity states use its name, {site.parameter_path!r}, for something else"
        if site.is_computed and self.distribution in CHANGING:
            return f"a parametrization computes it, and {self.distribution.value} factors follow a parameter"
        if site.is_computed and self.dtype == FROM_SEED:
            return "a parametrization computes it, and 'seed' factors take a parameter; use 'float32'"
        return site.barrier

    def wrap(self, lowering: Lowering, weight: Weight, survey: None) -> Iterator[Remark]:
        """Draw the factors, unless another use of the weight has brought them, and insert them."""
        state = state_of(lowering.graph_module, weight)
        if not state.has_factors:
            self._provide(state, weight)
        if state.is_drawn and state.rate_draw != rate_draw(**self._drawn(weight)):
            for site in weight.sites:
                yield missed(
                    site.node, site.layer, site.told("its weight has factors from another draw already")
                )
            return
        factors: Any = state.fuzzy_learning_rate_parameters
        state.scaled_in_graph = True
        for site in weight.sites:
            lowering.lower(site)
        if state.is_drawn:
            lowering.wrap_weight(weight.sites, scale_gradient_by_seed, None, "scaled", **self._drawn(weight))
        else:
            kept = f"{bio_module_path(weight.path)}.fuzzy_learning_rate_parameters"
            lowering.wrap_weight(weight.sites, ops.scale_gradient, (kept, "rates"), "scaled")
        numbers = {"mean": factors.float().mean().item(), "std": factors.float().std(correction=0).item()}
        message = f"{factors.numel()} factors{self._told(state)}, {self.distribution.value}, "
        message += f"mean {numbers['mean']:.3f}, "
        message += f"std {numbers['std']:.3f}"
        if len(weight.sites) > 1:
            message += f"; one set for {len(weight.sites)} uses of the weight"
        for site in weight.sites:
            yield applied(site.node, site.layer, site.told(message), factors=factors.numel(), **numbers)

    def _drawn(self, weight: Weight) -> dict[str, Any]:
        """Return what the factors of a weight are drawn from, as the graph says it."""
        depth = weight.depth if self.distribution is Distribution.LAYER_ADAPTIVE else 0.0
        output_axis = weight.sites[0].kind.output_axis
        return {
            "distribution": self.distribution.value,
            "nu": self.nu,
            "low": self.low,
            "high": self.high,
            "seed": self.seed,
            "path": weight.path,
            **told_of_place(depth, self.granularity, output_axis),
        }

    def _provide(self, state: BioModule, weight: Weight) -> None:
        state.depth = weight.depth
        state.config = state.config.replace(
            fuzzy_lr_min=self.low, fuzzy_lr_max=self.high, fuzzy_lr_dtype=self.dtype
        )
        if self.dtype == FROM_SEED:
            state.draw_factors_from(rate_draw(**self._drawn(weight)))
            return
        factors, noise = initial_factors(
            self.distribution,
            weight.parameter,
            nu=self.nu,
            low=self.low,
            high=self.high,
            generator=generator_for(self.seed, weight.path, purpose=PURPOSE),
            depth=weight.depth,
            granularity=self.granularity,
            output_axis=weight.sites[0].kind.output_axis,
        )
        state.store_factors(factors, self.dtype)
        # the random part of factors that go on changing, which coarser ones do not
        state.noise = noise if self.dtype == "float32" else None

    def _told(self, state: BioModule) -> str:
        if state.is_drawn:
            return " drawn from their seed at each backward"
        return "" if self.dtype == "float32" else f" in {self.dtype}"
