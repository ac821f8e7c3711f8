"""Make every unit excitatory or inhibitory: ``weight`` becomes ``constrain_sign(weight, sign)``.

A neuron releases the same transmitters at all of its outgoing synapses (Dale's principle), so the sign of a
weight belongs to the presynaptic unit: a column of a weight of shape ``(out, in, *)``. Whose activity a
column reads is found by following the graph (:func:`biofx.unit_groups`), so all weights that read a unit
agree on its sign.

Source: Song, Yang, Wang, "Training excitatory-inhibitory recurrent neural networks for cognitive tasks",
PLOS Computational Biology 12 (2016); Cornford et al., "Learning to live with Dale's principle", ICLR 2021.

Deviations: inputs of the model and the synapses onto its outputs are free unless asked for; queries and keys
of attention, which are compared and not passed on, are free always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from biofx.analysis.observation import find_all_sites, weights_in_python
from biofx.analysis.sign_survey import SignSurvey, refuse_unused_signs
from biofx.config import option_from_config
from biofx.graph.analysis_cache import unchanged
from biofx.layers.lowering import Lowering
from biofx.layers.weight_site import WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.sign_ops import constrain_sign
from biofx.options import with_documented_options
from biofx.rewriting.gains import constrain_gains, fold_negative_gains, in_scope
from biofx.rewriting.remarks import Remark, applied, done_already, missed
from biofx.rewriting.scope import Scope
from biofx.rewriting.signed_weights import can_balance, describe_signs, insert_signs, is_trained, why_free
from biofx.rewriting.weight_pass import WeightPass, WeightUses, unsupported

EXPAND = "expand"
"""The method that leaves the model's function as it is."""


@with_documented_options
@dataclass(frozen=True, kw_only=True)
class ConstrainSigns(WeightPass):
    """Give each presynaptic unit one sign, which all weights that read it carry at every forward."""

    name: ClassVar[str] = "constrain-signs"
    mechanism: ClassVar[str] = "signs"
    after: ClassVar[tuple[str, ...]] = ("split-weights", "expand-units", "mask-weights")

    method: str = option_from_config("dales_method")
    axis: str = option_from_config("dales_axis")
    initialisation: str = option_from_config("dales_initialisation")
    excitatory_fraction: float = option_from_config("dales_excitatory_fraction")
    signs: tuple[int, ...] | None = option_from_config("dales_signs")
    constrain_inputs: bool = option_from_config("dales_constrain_inputs")
    constrain_readout: bool = option_from_config("dales_constrain_readout")
    seed: int = option_from_config("seed")

    def reason_against(self, site: WeightSite, survey: SignSurvey) -> Remark | None:
        """Leave alone what is constrained already, inputs and readouts of the model, queries and keys."""
        if site.has(constrain_sign):
            return done_already(site.node, site.layer, "its signs are constrained already")
        reason = self._reason_against(site, survey)
        if reason is None:
            return None
        return missed(site.node, site.layer, reason, **self._asked_at(site, survey))

    def _reason_against(self, site: WeightSite, survey: SignSurvey) -> str | None:
        if site.is_scaled:
            return "its gradient is scaled already, and signs must be constrained before that"
        if site.parameter.is_meta:
            return "its weight is on the meta device and has no values"
        reason = why_free(
            site, survey, constrain_inputs=self.constrain_inputs, constrain_readout=self.constrain_readout
        )
        if reason is None and self.method == EXPAND and not survey.has_known_signs(site):
            reason = "its presynaptic units were not expanded, and have no sign"
        if reason is None and (blocker := site.value_blocker) is not None:
            reason = blocker + survey.what_contradicts(site)
        return reason

    def _asked_at(self, site: WeightSite, survey: SignSurvey) -> dict[str, Any]:
        """Return details that say that an input or a readout of the model was asked for."""
        if self.constrain_readout and survey.is_readout(site):
            return {"asked_as": "the readout"}
        asked = self.constrain_inputs and survey.why_no_signs(site) is None and survey.reads_only_inputs(site)
        return {"asked_as": "the input layer"} if asked else {}

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Constrain each selected weight, and the gains of normalisations between units with signs.

        Raises:
            OptionError: signs were given that nothing uses, or two uses of a weight have different options.
        """
        with unchanged():
            sites = find_all_sites(graph_module)
            survey = SignSurvey(graph_module, lambda node, layer: scope.variant(self, node, layer))
            lowering = Lowering(graph_module)
        shown = dataclasses.replace(sites, found=[*sites.found, *weights_in_python(sites)])
        chosen = yield from self.choose(shown, scope, survey, lowering)
        if self.axis == "presynaptic":
            norms = survey.norms_read_by([uses.weight for _, uses in chosen])
            wanted = in_scope(scope, graph_module, norms)
            survey.folded = fold_negative_gains(lowering, wanted, survey.layers)
        yield from self.rewrite_chosen(chosen, scope)

        def why_not(site: WeightSite, survey: SignSurvey) -> str | None:
            remark = self.remark_against(site, scope, survey)
            return None if remark is None else remark.message

        refuse_unused_signs(survey, scope.overrides, self.signs, axis=self.axis, why_not=why_not)
        if self.axis == "presynaptic":
            for reading in survey.groups.readings if self.method != EXPAND else ():
                if scope.why_not(reading.site.node, reading.site.layer) is None:
                    survey.store.leave_free(reading)
            yield from constrain_gains(scope, lowering, norms, survey.folded, exact=self._keeps_a_function)
        yield from unsupported(sites)

    def rewrite_node(self, candidate: WeightUses, options: WeightPass) -> Iterator[Remark]:
        """Find the signs of the units that a weight reads, draw those that have none, and insert them."""
        weight, survey = candidate.weight, candidate.survey
        kept = self.initialisation == "keep" or self.method == EXPAND
        balances = self.axis == "presynaptic" and not kept and not survey.is_used_elsewhere(weight)
        balances = balances and can_balance(weight, candidate.lowering.graph_module)
        method = "project" if self.method == EXPAND else self.method
        trained = {"looks_trained": True} if balances and is_trained(weight, candidate.lowering) else {}
        numbers = insert_signs(
            weight,
            candidate.lowering,
            survey,
            axis=self.axis,
            method=method,
            excitatory_fraction=self.excitatory_fraction,
            seed=self.seed,
            balances=balances,
        )
        message = describe_signs(weight, numbers, axis=self.axis, method=method, balances=balances)
        message += "; it looked trained" if trained else ""
        for site in weight.sites:
            unsure = survey.what_is_not_guaranteed(site) if self.axis == "presynaptic" else ""
            yield applied(site.node, site.layer, site.describe(message + unsure), **numbers, **trained)

    @property
    def _keeps_a_function(self) -> bool:
        """Whether some layer keeps its function; a normalisation may serve any of them."""
        overridden = (dict(entry.options).get("method") for entry in self.overrides)
        return EXPAND in (self.method, *overridden)
