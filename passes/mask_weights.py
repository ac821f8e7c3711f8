"""Leave out connections: ``weight`` becomes ``mask_weight(weight, mask)``, with exactly 0 where none exists.

A unit is connected to few others: one in ten within a cortical column, fewer between areas, rarely to itself.
Which connections exist is fixed, unless ``rejuvenate_weights`` moves some (:mod:`biofx.plasticity.turnover`).

Source: Song, Yang, Wang, "Training excitatory-inhibitory recurrent neural networks for cognitive tasks",
PLOS Computational Biology 12 (2016), for masks and areas; Evci, Ioannou, Keskin, Dauphin, "Gradient flow in
sparse neural networks and how lottery tickets win", AAAI 2022, for initial weights.

Deviations: each unit of a layer has the same number of connections, to within one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from biofx.config import option_from_config
from biofx.layers.lowering import Lowering
from biofx.layers.weight_site import Sites, Weight, WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.mask_ops import mask_weight
from biofx.option_names import named_option
from biofx.options import with_documented_options
from biofx.plasticity.model_states import is_taken
from biofx.rewriting.masked_weights import MaskSurvey, Wiring, insert_mask
from biofx.rewriting.remarks import Remark, applied, done_already, missed, switched_off
from biofx.rewriting.scope import Scope
from biofx.rewriting.weight_pass import WeightPass, WeightUses


@with_documented_options
@dataclass(frozen=True, kw_only=True)
class MaskWeights(WeightPass):
    """Let only some of the connections between units exist."""

    name: ClassVar[str] = "mask-weights"
    mechanism: ClassVar[str] = "masks"
    after: ClassVar[tuple[str, ...]] = ("split-weights", "expand-units")

    density: float = option_from_config("weight_density")
    self_connections: bool = option_from_config("weight_mask_self_connections")
    blocks: tuple[tuple[float, ...], ...] | None = option_from_config("weight_mask_blocks")
    areas: tuple[Any, ...] | None = option_from_config("weight_mask_areas")
    mask: str | None = option_from_config("weight_mask")
    initialisation: str = option_from_config("weight_mask_initialisation")
    growth: str = option_from_config("rejuvenation_growth")
    seed: int = option_from_config("seed")

    def survey(self, graph_module: BioGraphModule, scope: Scope) -> MaskSurvey:
        """Find out who reads whose units, and all uses of each weight."""
        return MaskSurvey(graph_module)

    def weights(self, sites: Sites, scope: Scope) -> Iterable[Weight]:
        """Return the weights with whatever else reads them."""
        return sites.weights_and_reads(directly=False)

    def reason_against(self, site: WeightSite, survey: MaskSurvey) -> Remark | None:
        """Leave alone what is masked, signed or scaled already, has no units, or keeps all connections."""
        if site.has(mask_weight):
            return done_already(site.node, site.layer, "it is masked already")
        if self._is_whole and self.self_connections:
            density = named_option(self.name, "density", 1)
            reason = f"every connection exists, without blocks and mask ({density})"
            return switched_off(site.node, site.layer, reason)
        why = self._reason_against(site, survey)
        return None if why is None else missed(site.node, site.layer, why)

    @property
    def _is_whole(self) -> bool:
        return self.density == 1 and self.blocks is None and self.mask is None

    def _reason_against(self, site: WeightSite, survey: MaskSurvey) -> str | None:
        if why := survey.why_no_units(site):
            return f"{why}, which could be connected or not"
        if site.computation is not None and not site.computation.keeps_zeros:
            return f"the forward makes it by {site.computation.words}, which is not 0 where the parameter is"
        if site.operators:
            return f"it passes through {site.operators[0].name!r} already, and masks come before that"
        if site.parameter.is_meta:
            return "its weight is on the meta device and has no values"
        if site.is_computed or site.parameter.is_complex():
            return site.value_blocker
        if site.lowering_blocker is None and is_taken(site.parameter_path):
            return f"plasticity states use its name, {site.parameter_path!r}, for something else"
        if survey.is_of_pairs(site):
            return "its units are pairs of an excitatory and an inhibitory one (dales_method='expand')"
        if not self.self_connections and (unknown := survey.why_not_known(site)):
            return f"{unknown}, so self-connections cannot be told (give example_inputs)"
        if self._is_whole and survey.self_connections(site) is None:
            return "it reads none of the units that it makes, so it has no self-connections"
        return site.lowering_blocker

    def choose(
        self, sites: Sites, scope: Scope, survey: Any, lowering: Lowering
    ) -> Generator[Remark, None, list[tuple[Any, WeightUses]]]:
        """Leave alone a weight that is masked at some of its uses only, too."""
        chosen = []
        for options, uses in (yield from super().choose(sites, scope, survey, lowering)):
            every = survey.weight_at(uses.weight.sites[0]).sites
            if len(every) == len(uses.weight.sites):
                chosen.append((options, uses))
                continue
            other = next(site for site in every if site not in uses.weight.sites)
            for site in uses.weight.sites:
                reason = f"its weight is also used by {other.node.name!r}, where it is not masked"
                yield missed(site.node, site.layer, site.describe(reason))
        return chosen

    def rewrite_node(self, candidate: WeightUses, options: WeightPass) -> Iterator[Remark]:
        """Draw the connections of a weight, and mask it at all of its uses."""
        weight = candidate.weight
        own = None if self.self_connections else candidate.survey.self_connections(weight.sites[0])
        wiring = Wiring(
            *(self.density, self.blocks, self.areas, self.mask, self.initialisation == "rescale"),
            probes=self.growth == "gradient",
            seed=self.seed,
        )
        found = insert_mask(weight, candidate.lowering, wiring, own)
        share, ends = found["connections"] / found["weights"], (found["fewest"], found["most"])
        each = " to ".join(dict.fromkeys(map(str, ends)))
        scales = [f"{(found['possible'] / count) ** 0.5:.3g}" for count in reversed(ends) if count]
        message = (
            f"{found['connections']} of {found['weights']} weights are connections (density {share:.3g}), "
            f"{each} of {found['possible']} for each unit"
        )
        if scales and self.initialisation == "rescale":
            message += f", and multiplied by {' to '.join(dict.fromkeys(scales))}"
        message += "" if own is None else f"; none of {int(own.sum())} self-connections"
        message += f"; {found['forbidden']} can never exist" if found["forbidden"] else ""
        for site in weight.sites:
            yield applied(site.node, site.layer, site.describe(message), density=share, **found)
