"""Watch what every weight reads, so that the units that contribute least can be replaced.

The rule ``rejuvenate_units`` replaces units (:mod:`biofx.plasticity.unit_turnover` says how, and whence). It
needs to know which entries of which parameters are a unit's, which follows from the graph, and how active a
unit is where weights read it, which an operator in the graph observes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from biofx.analysis.units import Reading
from biofx.layers.weight_site import WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.observed_inputs import observe_inputs
from biofx.plasticity.model_states import bio_module_at, bio_module_path, kept_state
from biofx.plasticity.unit_turnover import NOT_WATCHED, UnitNorm, UnitReader, UnitTurnover, UnitWriter
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
        tuple(
            UnitWriter(bio_module_at(graph_module, site.parameter_path), rows) for site, rows in units.writers
        ),
        tuple(
            UnitReader(bio_module_at(graph_module, reading.site.parameter_path), index)
            for reading, index in units.readers
        ),
        tuple(UnitNorm(module, index) for module, index in units.norms),
    )
    lead = bio_module_at(graph_module, units.writers[0][0].parameter_path)
    turnover.start(lead)
    lead.turns_over(turnover)
    for reading, _ in units.readers:
        _observe(reading)


def _observe(reading: Reading) -> None:
    """Let what a weight reads pass through the operator that observes it."""
    site, node = reading.site, reading.site.node
    source = node.args[0] if node.args else node.kwargs["input"]
    if not isinstance(source, Node) or source.target is observe_inputs:
        return  # another group of units that it reads has put it there
    path, graph, stack = bio_module_path(site.parameter_path), node.graph, node.meta.get("nn_module_stack")
    with graph.inserting_before(node):
        seen = graph.create_node("get_attr", f"{path}.input_activity", name=f"{node.name}_seen")
        training = graph.create_node("get_attr", f"{path}.training", name=f"{node.name}_watching")
        options: dict[str, Any] = {"channel_axis": site.kind.channel_axis, "nonnegative": reading.nonnegative}
        watched = graph.call_function(observe_inputs, (source, seen, training), options)
    watched.name = f"{node.name}_watched"
    for made in (seen, training, watched):
        made.meta = {} if stack is None else {"nn_module_stack": stack}
    if node.args:
        node.args = (watched, *node.args[1:])
    else:
        node.kwargs = {**node.kwargs, "input": watched}
