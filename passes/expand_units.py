"""Split each unit in two: it becomes an excitatory and an inhibitory copy, and the model's function stays.

A trained unit has synapses of both signs. Its excitatory copy takes over the positive ones and its inhibitory
copy the negative ones; both receive what the unit received. From then on they learn by themselves.

Source: the construction is that of Dale networks with paired populations, as in Song, Yang, Wang, PLOS
Computational Biology 12 (2016), made exact: w = max(w, 0) + min(w, 0).

Deviations: the network becomes wider, by a factor of two in each layer whose units are expanded. Units whose
number an operation names, and those of recurrent layers and attention, are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from biofx.analysis.readouts import last_synapses
from biofx.analysis.unit_groups import unit_groups_of_graphs
from biofx.config import option_from_config
from biofx.layers.lowering import Lowering
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.option_names import named_option
from biofx.options import with_documented_options
from biofx.rewriting.expansion import Circuit, Expandability, circuits, expand
from biofx.rewriting.gains import fold_negative_gains, in_scope
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.remarks import Remark, applied, missed, switched_off
from biofx.rewriting.scope import Scope
from biofx.rewriting.weight_pass import unsupported

_READOUT_FREE = named_option("expand-units", "constrain_readout", False)


@with_documented_options
@dataclass(frozen=True, kw_only=True)
class ExpandUnits(Pass):
    """Give every unit an excitatory and an inhibitory copy, and each its sign."""

    name: ClassVar[str] = "expand-units"
    mechanism: ClassVar[str] = "expanded units"
    after: ClassVar[tuple[str, ...]] = ("split-weights",)

    constrain_readout: bool = option_from_config(
        "dales_constrain_readout",
        doc="Whether units that only layers before the model's outputs read are expanded too.",
    )

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Expand each circuit of units that can be expanded as a whole."""
        sites = find_sites(graph_module)
        groups, lowering = unit_groups_of_graphs(graph_module), Lowering(graph_module)
        last = last_synapses(graph_module)
        told: dict[tuple[Node, str], Remark] = {}
        chosen: list[Circuit] = []
        makers: dict[str, list[WeightSite]] = {}
        for site in sites.found:
            makers.setdefault(site.parameter_path, []).append(site)
        able = Expandability(groups, graph_module, makers)
        for circuit in circuits(groups):
            reason = self._reason_against(circuit, last)
            off = None if reason else _why_not_selected(circuit, scope, makers)
            reason = reason or off or able.why_not(circuit)
            if reason is None:
                chosen.append(circuit)
            for reading in circuit.readings:
                site = reading.site
                kind = applied if reason is None else switched_off if off else missed
                message = site.describe(
                    reason or f"reads {len(reading.units)} channels as pairs of both signs"
                )
                told[site.node, site.parameter_path] = kind(site.node, site.layer, message)
        made = {source.name: circuit for circuit in chosen for source in circuit.sources}
        norms = {node for circuit in chosen for node in circuit.nodes if node in groups.norms}
        fold_negative_gains(
            lowering,
            in_scope(scope, graph_module, norms),
            {s.node: s for s in sites.found if s.is_plain_layer},
        )
        for circuit in chosen:
            with scope.rewriting(circuit.readings[0].site.node):
                changed = expand(circuit, groups, lowering, makers)
            for site in changed:
                with scope.rewriting(site.node):
                    lowering.lower(site)
        for site in sites.found:
            if site.kind.why_no_units or (site.node, site.parameter_path) not in told:
                reason = site.kind.why_no_units or site.lowering_blocker or "it reads no units"
                yield missed(site.node, site.layer, site.describe(reason))
                continue
            remark = told[site.node, site.parameter_path]
            if site.parameter_path in made:
                units = site.output_channels
                message = f"its {units} units became {units} excitatory and {units} inhibitory ones"
                also = f"{remark.message}; " if remark.kind == "applied" else ""
                remark = applied(site.node, site.layer, also + message, units=units)
            yield remark
        yield from unsupported(sites)

    def _reason_against(self, circuit: Circuit, last: Mapping[Node, str | None]) -> str | None:
        """Return why a circuit is not to be expanded, None if it is."""
        if not circuit.readings:
            return "no weight reads its units"
        regions = [last.get(reading.site.node, "") for reading in circuit.readings]
        if not self.constrain_readout and all(region is None for region in regions):
            return f"only a readout reads its units ({_READOUT_FREE})"
        if not self.constrain_readout and all(regions):
            return (
                "whether more than a readout reads its units is not known: Python calls "
                f"{regions[0]!r} ({_READOUT_FREE})"
            )
        return None


def _why_not_selected(circuit: Circuit, scope: Scope, makers: dict[str, list[WeightSite]]) -> str | None:
    """Return which layer of a circuit is not selected, and why, None if all are."""
    parties = [reading.site for reading in circuit.readings]
    parties += [site for source in circuit.sources for site in makers.get(source.name, ())]
    for site in parties:
        reason = scope.why_not(site.node, site.layer)
        if reason is not None:
            return f"{site.layer!r} takes part: {reason}"
    return None
