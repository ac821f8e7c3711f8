"""Watch what every weight reads, so that the units that contribute least can be replaced.

The rule ``rejuvenate_units`` replaces units (:mod:`biofx.plasticity.unit_turnover` says how, and whence). It
needs to know which entries of which parameters are a unit's, which follows from the graph, and how active a
unit is where weights read it, which an operator in the graph observes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from biofx.layers.weight_site import Weight, WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import bio_module_at, kept_state, state_of
from biofx.plasticity.unit_entries import Channels, UnitNorm, UnitReader, UnitWriter
from biofx.plasticity.unit_turnover import NOT_WATCHED, UnitTurnover
from biofx.rewriting.observed_readings import observe_reading
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.remarks import Remark, applied, done_already, missed, switched_off
from biofx.rewriting.scope import Scope
from biofx.rewriting.watched_units import UnitWatch, WatchedUnits
from biofx.rewriting.weight_pass import unsupported


@dataclass(frozen=True, kw_only=True)
class WatchUnits(Pass):
    """Observe the activity that weights read, and find the entries of each unit, to replace units."""

    name: ClassVar[str] = "watch-units"
    mechanism: ClassVar[str] = "turnover of units"
    after: ClassVar[tuple[str, ...]] = (
        *("split-weights", "expand-units", "mask-weights", "constrain-signs", "scale-gradients"),
        *("observe-activity", "fold-splits"),
    )

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Watch the units of each layer that is selected with all that takes part in them."""
        watch = UnitWatch(graph_module)
        found = [
            (site, _units(watch, site, scope, graph_module))
            for site in watch.sites.found
            if not site.is_further
        ]
        leads: dict[str, WeightSite] = {}
        for site, units in found:
            if isinstance(units, Remark):
                yield units
                continue
            lead = units.writers[0][0]
            if lead.parameter_path not in leads:
                leads[lead.parameter_path] = lead
                with scope.rewriting(lead.node):
                    _watch(graph_module, units)
            readers = ", ".join(dict.fromkeys(repr(reading.site.layer) for reading, _ in units.readers))
            message = f"{units.count} units can be replaced, read by {readers}"
            if lead is not site:
                message += f", together with those of {lead.layer!r}"
                bio_module_at(graph_module, site.parameter_path).turns_over(
                    f"its units go with those of {lead.layer!r}"
                )
            yield applied(site.node, site.layer, message, units=units.count)
        yield from unsupported(watch.sites)


def _units(
    watch: UnitWatch, site: WeightSite, scope: Scope, graph_module: BioGraphModule
) -> WatchedUnits | Remark:
    """Return the units that a weight makes, or a remark on why they stay."""
    reason = scope.why_not(site.node, site.layer)
    if reason is not None:
        return switched_off(site.node, site.layer, site.describe(reason))
    state = kept_state(graph_module, site.parameter_path)
    if state is not None and state.turnover != NOT_WATCHED:
        return done_already(site.node, site.layer, site.describe("its units are watched already"))
    units = watch.units_of(site)
    if isinstance(units, str):
        return missed(site.node, site.layer, site.describe(units))
    for part in (*(writer for writer, _ in units.writers), *(reading.site for reading, _ in units.readers)):
        reason = scope.why_not(part.node, part.layer)
        if reason is not None:
            return switched_off(site.node, site.layer, f"{part.layer!r} takes part: {reason}")
    return units


def _watch(graph_module: BioGraphModule, units: WatchedUnits) -> None:
    turnover = UnitTurnover(
        units.count,
        tuple(UnitWriter(_state_of(graph_module, site), Channels(rows)) for site, rows in units.writers),
        tuple(
            UnitReader(_state_of(graph_module, reading.site), Channels(index))
            for reading, index in units.readers
        ),
        tuple(UnitNorm(module, Channels(index)) for module, index in units.norms),
    )
    lead = turnover.writers[0].state
    turnover.start(lead)
    lead.turns_over(turnover)
    for reading, _ in units.readers:
        observe_reading(reading)


def _state_of(graph_module: BioGraphModule, site: WeightSite) -> BioModule:
    return state_of(graph_module, Weight((site,), 0.0))
