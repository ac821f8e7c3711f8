"""Give a weight the signs of its presynaptic units: ``weight`` becomes ``constrain_sign(weight, sign)``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from biofx.analysis.sign_store import bring_signs, keep_row_signs, states_of
from biofx.analysis.sign_survey import SignSurvey
from biofx.errors import BiofxWarning, InvariantError, PassError
from biofx.layers.constant_part import ConstantPart
from biofx.layers.lowering import Lowering, node_stem
from biofx.layers.single_weight import LOOKUP_KINDS
from biofx.layers.weight_site import Weight, WeightSite, whole_weight
from biofx.operators.mask_ops import existing
from biofx.operators.sampling import generator_for
from biofx.operators.sign_ops import constrain_sign, signs_like
from biofx.option_names import named_option
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.exchangeability import looks_trained
from biofx.plasticity.model_states import bio_module_path, state_of
from biofx.plasticity.unit_inputs import balanced_weight, rows_of_units
from biofx.rewriting.remarks import Exempt, ReportRecord

COMPARED = "its outputs are queries or keys, which are compared and not passed on"
"""Why a weight, or some of its rows, have no signs."""


_INPUTS_FREE = named_option("constrain-signs", "constrain_inputs", False)
_READOUT_FREE = named_option("constrain-signs", "constrain_readout", False)


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
        reason = f"what feeds it is not known: Python calls {feeding!r} ({_INPUTS_FREE})"
        return f"{reason}; {survey.what_is_missing}"
    if following is not None and not constrain_readout:
        reason = f"what follows it is not known: Python calls {following!r} ({_READOUT_FREE})"
        return f"{reason}; {survey.what_is_missing}"
    if survey.reads_only_inputs(site) and not constrain_inputs:
        return Exempt(f"its presynaptic units are the model's inputs, which have no sign ({_INPUTS_FREE})")
    if survey.is_readout(site) and not constrain_readout and not survey.has_given_signs(site):
        return Exempt(f"it is a readout: no weights between it and the model's output ({_READOUT_FREE})")
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
    places = [site.where_signed for site in weight.sites]
    presynaptic = axis == "presynaptic"
    kept = (
        survey.store.keep(survey.groups.reading(first))
        if presynaptic
        else keep_row_signs(first, state, excitatory_fraction, seed)
    )
    state.unit_index = None if kept.index is None else kept.index.to(state.weight.device)
    layout, sources = _layout(places[0]), tuple(states_of(lowering.graph_module, kept))
    if first.signs_parameter:
        state.reads_signs_of(sources, layout)
    exempt = survey.groups.exempt_rows(first)
    if presynaptic and exempt.any():
        state.constrained_rows = (~exempt).to(torch.int8).to(state.weight.device)
    units = torch.cat([keeper.get_buffer(name) for keeper, name in sources]).sign()
    units = units if state.unit_index is None else units.index_select(0, state.unit_index)
    used = _values(first, state.masked_weight, lowering.graph_module)
    signs = signs_like(used, units, **layout, rows=state.constrained_rows)
    wrong = int((used * signs < 0).sum())
    if balances:
        rectified = survey.groups.reading(first).nonnegative
        made = _balanced(weight, state, signs, lowering, seed=seed, rectified=rectified)
        lowering.parameters.replace(state.weight, made)
    for site in weight.sites:
        lowering.lower(site)
    options: dict[str, Any] = dict(layout)
    if state.constrained_rows is not None and (read := places[0].weight_node) is not None:
        rows = f"{bio_module_path(weight.path)}.constrained_rows"
        options["rows"] = lowering.read(rows, read.next, f"{node_stem(weight.path)}_rows")
    lowering.wrap_weight(
        places,
        constrain_sign,
        lambda node, stem: bring_signs(lowering, kept, state, node, stem),
        "signed",
        **options,
        method=method if first.signs_parameter else "abs",
    )
    return {"excitatory": int((units > 0).sum()), "inhibitory": int((units < 0).sum()), "wrong": wrong}


def describe_signs(
    weight: Weight, numbers: Mapping[str, int], *, axis: str, method: str, balances: bool
) -> str:
    """Return what was done with a weight, in words.

    Args:
        weight: with the uses that got signs.
        numbers: what :func:`insert_signs` returned.
        axis: as there.
        method: as there.
        balances: as there.
    """
    who = "presynaptic units" if axis == "presynaptic" else "rows or kernels"
    site = weight.sites[0]
    fate = "are mirrored" if method == "abs" or not site.signs_parameter else "are held at 0"
    if balances:
        fate = "were given the right one, and all were made sparse and balanced"
    message = (
        f"{numbers['excitatory']} excitatory and {numbers['inhibitory']} inhibitory {who}; "
        f"{numbers['wrong']} of {weight.parameter.numel()} weights had the other sign and {fate}"
    )
    if site.computation is None:
        return message
    words = site.computation.words
    if site.signs_parameter:
        return f"{message}; what the forward makes of {weight.path} ({words}) keeps its signs"
    return f"{message}; the forward makes it by {words}, never negative, and signs act where it is used"


def can_balance(weight: Weight, graph_module: GraphModule) -> bool:
    """Whether a weight can be made sparse and balanced: each entry is a fixed multiple of the parameter's."""
    is_stack = any(site.kind.is_stack for site in weight.sites)
    return not is_stack and _multiples(weight, graph_module) is not None


def is_trained(weight: Weight, lowering: Lowering) -> bool:
    """Whether a weight looks as if it had been trained (:mod:`biofx.plasticity.exchangeability`)."""
    site, state = weight.sites[0], state_of(lowering.graph_module, weight)
    rows = rows_of_units(state.masked_weight, output_axis=site.kind.output_axis, groups=site.groups)
    return looks_trained(rows)


def warn_of_training(report: ReportRecord, stacklevel: int) -> None:
    """Warn once where weights that look trained were made sparse and balanced.

    Args:
        report: of all passes.
        stacklevel: as :func:`warnings.warn` takes it, from where this is called.
    """
    remarks = [remark for entry in report.passes for remark in entry.remarks]
    layers = list(dict.fromkeys(remark.layer for remark in remarks if remark.details.get("looks_trained")))
    if layers:
        shown = ", ".join([*map(repr, layers[:3]), *["…"] * (len(layers) > 3)])
        warnings.warn(
            f"the weights of {len(layers)} layers ({shown}) do not look freshly made, and signs have "
            "replaced them by sparse and balanced ones; of a trained model, dales_method='expand' keeps the "
            "function, and dales_initialisation='keep' the weights of the right sign",
            BiofxWarning,
            stacklevel=stacklevel + 1,
        )


def _multiples(weight: Weight, graph_module: GraphModule) -> Tensor | None:
    """Return what entries of a parameter are multiplied by before layers read them, None if it differs."""
    computations = [site.computation for site in weight.sites]
    if all(computation is None for computation in computations):
        return torch.ones((), device=weight.parameter.device)
    constants = ConstantPart(graph_module)
    found = [None if entry is None else entry.multiples(constants) for entry in computations]
    first = found[0]
    same = first is not None and all(entry is not None and torch.equal(entry, first) for entry in found)
    return first if same else None


def _balanced(
    weight: Weight, state: BioModule, signs: Tensor, lowering: Lowering, *, seed: int, rectified: bool
) -> Tensor:
    """Return sparse values for a parameter, with as much excitation as inhibition at each unit."""
    site, values, mask = weight.sites[0], state.masked_weight, state.connection_mask
    multiples = _multiples(weight, lowering.graph_module)
    if multiples is None:
        raise PassError(f"{weight.path!r}: what the forward makes of it cannot be balanced")
    is_read = multiples > 0
    is_read = is_read if mask is None else is_read & existing(mask)
    reads_all = bool(is_read.all())
    made = balanced_weight(
        values * multiples,
        signs if reads_all else torch.where(is_read, signs, 0),
        # sub-weights are sparse alike: their sum then varies as much as the weight did
        generator_for(seed, whole_weight(weight.path), purpose="balance"),
        output_axis=site.kind.output_axis,
        groups=site.groups,
        rectified=rectified,
    ).div_(multiples)
    if reads_all:
        return made
    unread = torch.where(signs == 0, values, values.abs() * signs)
    return torch.where(is_read, made, unread)


def _values(site: WeightSite, values: Tensor, graph_module: GraphModule) -> Tensor:
    """Return the values that signs act on, given the parameter's; ones where they are known when it runs."""
    if site.signs_parameter or site.computation is None:
        return values
    try:
        found: Tensor = ConstantPart(graph_module).value(site.computation.expression)
    except InvariantError:
        return torch.ones_like(values.mT if site.computation.is_turned else values)
    return found


def _layout(site: WeightSite) -> dict[str, int]:
    """Return how signs are laid out over the weight, as ``constrain_sign`` takes it."""
    layout = {"axis": site.kind.input_axis} if site.kind.input_axis != 1 else {}
    if site.groups > 1 and not site.kind.transposed:
        layout["groups"] = site.groups
    return layout
