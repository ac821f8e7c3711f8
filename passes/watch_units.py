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
from biofx.layers.layer_kind import argument
from biofx.layers.weight_site import Weight, WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.observed_inputs import observe_inputs, observe_state
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import bio_module_at, bio_module_path, kept_state, state_of
from biofx.plasticity.unit_entries import Channels, UnitNorm, UnitReader, UnitWriter
from biofx.plasticity.unit_turnover import NOT_WATCHED, UnitTurnover
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
        _observe(reading)


def _state_of(graph_module: BioGraphModule, site: WeightSite) -> BioModule:
    return state_of(graph_module, Weight((site,), 0.0))


def _observe(reading: Reading) -> None:
    """Let what a weight reads pass through the operator that observes it."""
    site, node = reading.site, reading.site.node
    if reading.layout is None:
        _observe_state(site)
        return
    source = argument(node, *site.kind.source)
    if not isinstance(source, Node) or source.target is observe_inputs:
        return  # another group of units that it reads has put it there
    options: dict[str, Any] = {"channel_axis": site.kind.channel_axis, "nonnegative": reading.nonnegative}
    with node.graph.inserting_before(node):
        seen = _buffers(site, node.name)
        watched = node.graph.call_function(observe_inputs, (source, *seen), options)
    _name(watched, f"{node.name}_watched", node)
    place, name = site.kind.source
    if len(node.args) > place:
        node.update_arg(place, watched)
    else:
        node.kwargs = {**node.kwargs, name: watched}


def _observe_state(site: WeightSite) -> None:
    """Let what a recurrent layer returns pass through the operator that observes its state."""
    node, users = site.node, list(site.node.users)
    options: dict[str, Any] = {"direction": site.slot.direction}
    with node.graph.inserting_after(node):
        watched = node.graph.call_function(observe_state, (node,), options)
    with node.graph.inserting_before(watched):
        watched.args = (node, *_buffers(site, f"{node.name}_{site.slot.name}"))
    _name(watched, f"{node.name}_{site.slot.name}_watched", node)
    for user in users:
        user.replace_input_with(node, watched)


def _buffers(site: WeightSite, stem: str) -> tuple[Node, Node]:
    """Return nodes that read what was seen, and whether to look."""
    graph, path = site.node.graph, bio_module_path(site.parameter_path)
    seen = graph.create_node("get_attr", f"{path}.input_activity", name=f"{stem}_seen")
    training = graph.create_node("get_attr", f"{path}.training", name=f"{stem}_watching")
    for made in (seen, training):
        _name(made, made.name, site.node)
    return seen, training


def _name(made: Node, name: str, near: Node) -> None:
    stack = near.meta.get("nn_module_stack")
    made.name, made.meta = name, {} if stack is None else {"nn_module_stack": stack}
