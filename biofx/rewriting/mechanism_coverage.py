"""How far each mechanism reached: signed of signable weights, scaled and split of synapses, and why not more.

A *synaptic* weight is a parameter that a layer multiplies activity with, or that something else uses so: a
product, or a product element by element that is then summed. Tables of which rows are looked up, biases and
gains are none, nor is the weight of a layer that is never called. *Signable* is a synaptic weight whose
presynaptic units are made inside the model, as far as is known: what reads the model's inputs is not, unless
inputs are constrained, and queries, keys and readouts are exempt, which their pass leaves free on purpose.
A layer that is not selected, or whose units are not known, counts as one that the mechanism did not reach.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from biofx.layers import kind_of
from biofx.layers.single_weight import LOOKUP_KINDS
from biofx.layers.sites import NEVER_CALLED
from biofx.layers.weight_site import READ, Sites, Weight, WeightSite
from biofx.operators.sign_ops import constrain_sign
from biofx.plasticity.model_states import kept_state
from biofx.rewriting.model_coverage import MechanismCoverage
from biofx.rewriting.remarks import PassReport, Remark
from biofx.rewriting.signed_weights import COMPARED

_PASSES = {"signed": "constrain-signs", "scaled": "scale-gradients", "split": "split-weights"}
"""The pass of each mechanism whose reach is counted."""
_QUOTED = re.compile(r"'[^']*'")


@dataclass(frozen=True)
class _Fate:
    """What became of a weight, or of some of its rows."""

    elements: int
    reason: str = ""
    """Why the mechanism does not act, empty if it does."""
    is_exempt: bool = False


_Said = dict[tuple[str | None, str], list[Remark]]
"""Remarks by the names of their nodes and the paths of their layers."""


def mechanisms_of(
    graph_module: GraphModule, sites: Sites, reports: Iterable[PassReport]
) -> tuple[MechanismCoverage, ...]:
    """Return how far the mechanisms reached whose passes ran.

    Args:
        graph_module: the model as it is now.
        sites: of its weights.
        reports: of the passes that ran.
    """
    remarks: dict[str, list[Remark]] = {}
    for report in reports:
        remarks.setdefault(report.name, []).extend(report.remarks)
    asked = {name: _by_place(remarks[ran]) for name, ran in _PASSES.items() if ran in remarks}
    if not asked:
        return ()
    weights = [weight for weight in sites.weights_and_reads(directly=False) if _is_synaptic(weight)]
    return tuple(
        _counted(
            mechanism,
            [[*_fates(graph_module, mechanism, weight, said)] for weight in weights]
            + [[fate] for fate in _unreached(graph_module, sites, weights)],
        )
        for mechanism, said in asked.items()
    )


def _by_place(remarks: list[Remark]) -> _Said:
    said: _Said = {}
    for remark in remarks:
        said.setdefault((remark.node, remark.layer), []).append(remark)
    return said


def _is_synaptic(weight: Weight) -> bool:
    """Whether a weight is no table of rows; of sub-weights the first stands for all."""
    layers = [site.kind for site in weight.sites if site.kind is not READ]
    is_table = bool(layers) and all(kind in LOOKUP_KINDS for kind in layers)
    return not is_table and not all(site.is_further for site in weight.sites)


def _counted(mechanism: str, weights: list[list[_Fate]]) -> MechanismCoverage:
    meant = [[fate for fate in fates if not fate.is_exempt] for fates in weights]
    meant = [fates for fates in meant if fates]
    reached = [fates for fates in meant if not any(fate.reason for fate in fates)]
    left: Counter[str] = Counter()
    exempt: Counter[str] = Counter()
    for fate in (fate for fates in weights for fate in fates if fate.reason):
        (exempt if fate.is_exempt else left)[_QUOTED.sub("'…'", fate.reason)] += fate.elements
    return MechanismCoverage(
        mechanism=mechanism,
        weights=len(reached),
        all_weights=len(meant),
        elements=sum(fate.elements for fates in reached for fate in fates),
        all_elements=sum(fate.elements for fates in meant for fate in fates),
        reasons=dict(sorted(left.items(), key=lambda item: (-item[1], item[0]))),
        exempt=dict(sorted(exempt.items(), key=lambda item: (-item[1], item[0]))),
    )


def _fates(graph_module: GraphModule, mechanism: str, weight: Weight, remarks: _Said) -> Iterator[_Fate]:
    """Yield what became of a weight; of its free rows and of the others, if both are there."""
    elements = weight.parameter.numel()
    said = [
        remark
        for site in weight.sites
        for remark in remarks.get((site.node.name, site.layer), ())
        if _is_about(remark, site)
    ]
    if not _acts(mechanism, weight, said):
        remark = next((remark for remark in said if not remark.is_in_force), None)
        reason = _without_remark(weight) if remark is None else remark.own_message
        yield _Fate(elements, reason, remark is not None and remark.reason == "exempt")
        return
    state = kept_state(graph_module, weight.path) if mechanism == "signed" else None
    rows = None if state is None else state.constrained_rows
    free = 0 if rows is None else elements * int((rows == 0).sum()) // len(rows)
    if free:
        yield _Fate(free, COMPARED, is_exempt=True)
    yield _Fate(elements - free)


def _acts(mechanism: str, weight: Weight, said: list[Remark]) -> bool:
    if mechanism == "signed":
        return any(site.has(constrain_sign) for site in weight.sites)
    if mechanism == "scaled":
        return any(site.is_scaled for site in weight.sites)
    return any(remark.is_in_force for remark in said)


def _is_about(remark: Remark, site: WeightSite) -> bool:
    """Whether a remark at a layer is on a use of a weight; of several, it begins with the weight's name."""
    return not site.kind.is_compound or remark.message.startswith(f"{site.slot.name}: ")


def _without_remark(weight: Weight) -> str:
    return next((site.kind.why_no_units for site in weight.sites if site.kind.why_no_units), "")


def _unreached(graph_module: GraphModule, sites: Sites, weights: list[Weight]) -> Iterator[_Fate]:
    """Yield the weights of layers that are called and that no pass can reach."""
    seen = {id(weight.parameter) for weight in weights}
    for layer in sites.unsupported:
        if layer.reason == NEVER_CALLED:
            continue
        module = graph_module.get_submodule(layer.layer)
        kind = kind_of(module)
        if kind is None or kind in LOOKUP_KINDS:  # what else uses a parameter is a read of it
            continue
        for parameter in module.parameters():
            if parameter.dim() > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield _Fate(parameter.numel(), layer.reason)
