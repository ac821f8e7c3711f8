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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from biofx.analysis.sign_store import bring_signs, keep_row_signs, states_of
from biofx.analysis.sign_survey import SignSurvey, refuse_unused_signs
from biofx.config import option_from_config
from biofx.layers.lowering import Lowering, node_stem
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import Weight, WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.sampling import generator_for
from biofx.operators.sign_ops import constrain_sign
from biofx.options import with_documented_options
from biofx.plasticity.model_states import bio_module_path, state_of
from biofx.plasticity.weight_rules import balanced_weight
from biofx.rewriting.gains import constrain_gains, fold_negative_gains, in_scope
from biofx.rewriting.remarks import Remark, applied, done_already, missed
from biofx.rewriting.scope import Scope
from biofx.rewriting.weight_pass import WeightPass, WeightUses, unsupported

EXPAND = "expand"
"""The method that leaves the model's function as it is."""


@with_documented_options
@dataclass(frozen=True, kw_only=True)
class ConstrainSigns(WeightPass):
    """Give each presynaptic unit one sign, which all weights that read it carry at every forward."""

    name: ClassVar[str] = "constrain-signs"
    mechanism: ClassVar[str] = "signs"
    after: ClassVar[tuple[str, ...]] = ("split-weights", "expand-units")

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
        return (
            None if reason is None else missed(site.node, site.layer, reason, **self._asked_at(site, survey))
        )

    def _reason_against(self, site: WeightSite, survey: SignSurvey) -> str | None:
        if site.is_scaled:
            return "its gradient is scaled already, and signs must be constrained before that"
        if site.parameter.is_meta:
            return "its weight is on the meta device and has no values"
        if (reason := survey.why_no_signs(site)) is not None:
            return reason
        feeding, following = survey.region_that_feeds(site), survey.region_that_follows(site)
        if feeding is not None and not self.constrain_inputs:
            return f"what feeds it is not known: Python calls {feeding!r} (constrain_inputs=False)"
        if following is not None and not self.constrain_readout:
            return f"what follows it is not known: Python calls {following!r} (constrain_readout=False)"
        if survey.reads_only_inputs(site) and not self.constrain_inputs:
            return "its presynaptic units are the model's inputs, which have no sign (constrain_inputs=False)"
        if survey.is_readout(site) and not self.constrain_readout:
            return "it is a readout: no weights between it and the model's output (constrain_readout=False)"
        if survey.is_exempt(site):
            return "its outputs are queries or keys, which are compared and not passed on"
        if self.method == EXPAND and not survey.has_known_signs(site):
            return "its presynaptic units were not expanded, and have no sign"
        return site.obstacle

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
        sites = find_sites(graph_module)
        survey = SignSurvey(graph_module, lambda node, layer: scope.variant(self, node, layer))
        lowering = Lowering(graph_module)
        chosen = yield from self.choose(sites, scope, survey, lowering)
        if self.axis == "presynaptic":
            norms = survey.norms_read_by([uses.weight for _, uses in chosen])
            wanted = in_scope(scope, graph_module, norms)
            survey.folded = fold_negative_gains(lowering, wanted, survey.layers)
        yield from self.rewrite_chosen(chosen, scope)
        refuse_unused_signs(survey, scope.overrides, self.signs, axis=self.axis, why_not=self._why_not(scope))
        if self.axis == "presynaptic":
            for reading in survey.groups.readings if self.method != EXPAND else ():
                if scope.why_not(reading.site.node, reading.site.layer) is None:
                    survey.store.leave_free(reading)
            yield from constrain_gains(scope, lowering, norms, survey.folded, exact=self._keeps_a_function)
        yield from unsupported(sites)

    def rewrite_node(self, candidate: WeightUses, options: WeightPass) -> Iterator[Remark]:
        """Find the signs of the units that a weight reads, draw those that have none, and insert them."""
        weight, lowering, survey = candidate.weight, candidate.lowering, candidate.survey
        state = state_of(lowering.graph_module, weight)
        first = weight.sites[0]
        kept = (
            survey.store.keep(survey.reading(first))
            if self.axis == "presynaptic"
            else keep_row_signs(first, state, self.excitatory_fraction, self.seed)
        )
        state.unit_index = None if kept.index is None else kept.index.to(state.weight.device)
        state.reads_signs_of(tuple(states_of(lowering.graph_module, kept)), _layout(first))
        exempt = survey.exempt_rows(first)
        if self.axis == "presynaptic" and exempt.any():
            state.constrained_rows = (~exempt).to(torch.int8).to(state.weight.device)
        signs = state.signs()
        wrong = int((state.weight.detach() * signs < 0).sum())
        balances = self._balances and not survey.is_used_elsewhere(weight)
        if balances:
            made = balanced_weight(
                state.weight.detach(),
                signs,
                generator_for(self.seed, weight.path, purpose="balance"),
                output_axis=first.kind.output_axis,
                groups=first.groups,
                rectified=survey.reading(first).nonnegative,
            )
            lowering.parameters.replace(state.weight, made)
        for site in weight.sites:
            lowering.lower(site)
        layout: dict[str, Any] = dict(state.sign_layout)
        if state.constrained_rows is not None and first.weight_node is not None:
            rows = f"{bio_module_path(weight.path)}.constrained_rows"
            layout["rows"] = lowering.read(rows, first.weight_node.next, f"{node_stem(weight.path)}_rows")
        lowering.wrap_weight(
            weight.sites,
            constrain_sign,
            lambda node, stem: bring_signs(lowering, kept, state, node, stem),
            "signed",
            **layout,
            method="project" if self.method == EXPAND else self.method,
        )
        units = state.presynaptic_signs()
        numbers = {
            "excitatory": int((units > 0).sum()),
            "inhibitory": int((units < 0).sum()),
            "wrong": wrong,
        }
        message = self._told(weight, numbers, balances=balances)
        for site in weight.sites:
            unsure = survey.what_is_not_guaranteed(site) if self.axis == "presynaptic" else ""
            yield applied(site.node, site.layer, site.told(message + unsure), **numbers)

    def _why_not(self, scope: Scope) -> Callable[[WeightSite, SignSurvey], str | None]:
        """Return what tells why a site has no signs."""

        def why_not(site: WeightSite, survey: SignSurvey) -> str | None:
            reason = scope.why_not(site.node, site.layer)
            if reason is not None:
                return reason
            remark = scope.variant(self, site.node, site.layer).reason_against(site, survey)
            return None if remark is None else remark.message

        return why_not

    @property
    def _keeps_a_function(self) -> bool:
        """Whether some layer is to compute what it did; which ones a normalisation serves is not asked."""
        overridden = (dict(entry.options).get("method") for entry in self.overrides)
        return EXPAND in (self.method, *overridden)

    @property
    def _balances(self) -> bool:
        kept = self.initialisation == "keep" or self.method == EXPAND
        return self.axis == "presynaptic" and not kept

    def _told(self, weight: Weight, numbers: dict[str, int], *, balances: bool) -> str:
        who = "presynaptic units" if self.axis == "presynaptic" else "rows or kernels"
        fate = "are mirrored" if self.method == "abs" else "are held at 0"
        if balances:
            fate = "were given the right one, and all were made sparse and balanced"
        return (
            f"{numbers['excitatory']} excitatory and {numbers['inhibitory']} inhibitory {who}; "
            f"{numbers['wrong']} of {weight.parameter.numel()} weights had the other sign and {fate}"
        )


def _layout(site: WeightSite) -> dict[str, int]:
    """Return how signs are laid out over the weight, as ``constrain_sign`` takes it."""
    layout = {"axis": site.kind.input_axis} if site.kind.input_axis != 1 else {}
    if site.groups > 1 and not site.kind.transposed:
        layout["groups"] = site.groups
    return layout
