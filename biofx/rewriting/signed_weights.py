"""Give a weight the signs of its presynaptic units: ``weight`` becomes ``constrain_sign(weight, sign)``."""

from __future__ import annotations

from typing import Any

import torch

from biofx.analysis.sign_store import bring_signs, keep_row_signs, states_of
from biofx.analysis.sign_survey import SignSurvey
from biofx.layers.lowering import Lowering, node_stem
from biofx.layers.single_weight import LOOKUP_KINDS
from biofx.layers.weight_site import Weight, WeightSite, whole_weight
from biofx.operators.mask_ops import mask_weight
from biofx.operators.sampling import generator_for
from biofx.operators.sign_ops import constrain_sign
from biofx.plasticity.model_states import bio_module_path, state_of
from biofx.plasticity.unit_inputs import balanced_weight
from biofx.rewriting.remarks import Exempt

COMPARED = "its outputs are queries or keys, which are compared and not passed on"
"""Why a weight, or some of its rows, have no signs."""


def why_free(
    site: WeightSite, survey: SignSurvey, *, constrain_inputs: bool, constrain_readout: bool
) -> str | None:
    """Return why a weight has no signs, as far as that depends on its place in the model; None if it has.

    A readout of units whose signs were given carries those signs, whatever the options say of readouts.
    """
    if (reason := survey.why_no_signs(site)) is not None:
        return Exempt(reason) if site.kind in LOOKUP_KINDS else reason
    feeding, following = survey.groups.region_that_feeds(site), survey.region_that_follows(site)
    if feeding is not None and not constrain_inputs:
        reason = f"what feeds it is not known: Python calls {feeding!r} (constrain_inputs=False)"
        return f"{reason}; {survey.what_is_missing}"
    if following is not None and not constrain_readout:
        reason = f"what follows it is not known: Python calls {following!r} (constrain_readout=False)"
        return f"{reason}; {survey.what_is_missing}"
    if survey.reads_only_inputs(site) and not constrain_inputs:
        return Exempt(
            "its presynaptic units are the model's inputs, which have no sign (constrain_inputs=False)"
        )
    if survey.is_readout(site) and not constrain_readout and not survey.has_given_signs(site):
        return Exempt(
            "it is a readout: no weights between it and the model's output (constrain_readout=False)"
        )
    return Exempt(COMPARED) if survey.is_exempt(site) else None


def insert_signs(
    weight: Weight,
    lowering: Lowering,
    survey: SignSurvey,
    *,
    axis: str,
    method: str,
    excitatory_fraction: float,
    seed: int,
    balances: bool,
) -> dict[str, int]:
    """Find the signs of the units that a weight reads, draw those that have none, and insert them.

    Args:
        weight: with the uses that get signs.
        lowering: of the graph.
        survey: of the graph before the pass.
        axis: one of :data:`~biofx.operators.sign_ops.SIGN_AXES`.
        method: one of :data:`~biofx.operators.sign_ops.SIGN_METHODS`.
        excitatory_fraction: fraction of the rows that are excitatory, in [0, 1], for postsynaptic signs.
        seed: from which signs are sampled.
        balances: whether the weight is made sparse, with as much excitation as inhibition at each unit.

    Returns:
        Counts: ``"excitatory"`` and ``"inhibitory"`` units, and the weights with the ``"wrong"`` sign.

    Raises:
        OptionError: signs or fractions that are given contradict each other.
    """
    state, first = state_of(lowering.graph_module, weight), weight.sites[0]
    presynaptic = axis == "presynaptic"
    kept = (
        survey.store.keep(survey.groups.reading(first))
        if presynaptic
        else keep_row_signs(first, state, excitatory_fraction, seed)
    )
    state.unit_index = None if kept.index is None else kept.index.to(state.weight.device)
    state.reads_signs_of(tuple(states_of(lowering.graph_module, kept)), _layout(first))
    exempt = survey.groups.exempt_rows(first)
    if presynaptic and exempt.any():
        state.constrained_rows = (~exempt).to(torch.int8).to(state.weight.device)
    signs = state.signs()
    wrong = int((state.masked_weight * signs < 0).sum())
    if balances:
        mask = state.connection_mask
        made = balanced_weight(
            state.masked_weight,
            signs if mask is None else mask_weight(signs.expand_as(mask), mask),
            # sub-weights are sparse alike: their sum then varies as much as the weight did
            generator_for(seed, whole_weight(weight.path), purpose="balance"),
            output_axis=first.kind.output_axis,
            groups=first.groups,
            rectified=survey.groups.reading(first).nonnegative,
        )
        lowering.parameters.replace(state.weight, made)
    for site in weight.sites:
        lowering.lower(site)
    options: dict[str, Any] = dict(state.sign_layout)
    if state.constrained_rows is not None and first.weight_node is not None:
        rows = f"{bio_module_path(weight.path)}.constrained_rows"
        options["rows"] = lowering.read(rows, first.weight_node.next, f"{node_stem(weight.path)}_rows")
    lowering.wrap_weight(
        weight.sites,
        constrain_sign,
        lambda node, stem: bring_signs(lowering, kept, state, node, stem),
        "signed",
        **options,
        method=method,
    )
    units = state.presynaptic_signs()
    return {"excitatory": int((units > 0).sum()), "inhibitory": int((units < 0).sum()), "wrong": wrong}


def _layout(site: WeightSite) -> dict[str, int]:
    """Return how signs are laid out over the weight, as ``constrain_sign`` takes it."""
    layout = {"axis": site.kind.input_axis} if site.kind.input_axis != 1 else {}
    if site.groups > 1 and not site.kind.transposed:
        layout["groups"] = site.groups
    return layout
