"""Which units of a model can be turned over: all that makes and reads them is known, and which entries do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from biofx.analysis import rules_elementwise as elementwise
from biofx.analysis import rules_norms_pooling as layers
from biofx.analysis import rules_parts as parts
from biofx.analysis import rules_shapes as shapes
from biofx.analysis.forward import rule_for
from biofx.analysis.layout import UnitLayout
from biofx.analysis.unit_groups import UnitGroups
from biofx.analysis.units import Reading, Source, UnitAnalysis, UnitRule, UnitValue
from biofx.graph.joined_graph import whole_view
from biofx.graph.node_kinds import queries_metadata
from biofx.layers.layer_kind import argument
from biofx.layers.recurrent import RECURRENT_KINDS
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import Sites, WeightSite, sum_behind
from biofx.operators.mask_ops import mask_weight
from biofx.operators.rate_ops import GRADIENT_SCALINGS
from biofx.operators.sign_ops import constrain_sign
from biofx.plasticity.unit_entries import bias_name, bias_of
from biofx.rewriting.expansion import NORMS
from biofx.rewriting.gains import has_own_bias, shared_parameters

_PASSED: frozenset[UnitRule] = frozenset(
    {
        *(elementwise.keeps, elementwise.never_negative, elementwise.perhaps_negative, elementwise.bounded),
        *(parts.joined, layers.normalised, layers.pooled_over_space),
        *(shapes.flattened, shapes.reshaped, shapes.reduced, shapes.axis_removed, shapes.axis_inserted),
        *(shapes.permuted, shapes.transposed),
    }
)
_COMBINED: frozenset[UnitRule] = frozenset(
    {
        *(elementwise.added, elementwise.subtracted, elementwise.multiplied, elementwise.divided),
        *(elementwise.raised, elementwise.chosen, elementwise.chosen_by_mode, elementwise.masked),
    }
)
"""What takes several values, entry by entry."""
_KEPT = GRADIENT_SCALINGS | {mask_weight, constrain_sign}
_PRODUCTS = (torch.matmul, torch.mm, torch.addmm)
"""Products ``x @ weight`` in which entries of units are known."""


class _EveryRule(UnitAnalysis):
    """The analysis of a graph by all rules, with those that no other pass had in earlier versions."""

    is_observed = True


@dataclass(frozen=True)
class WatchedUnits:
    """Units that can be turned over, and who has entries of theirs, each with the unit at each channel."""

    count: int
    writers: list[tuple[WeightSite, Tensor]]
    """The unit of each output."""
    readers: list[tuple[Reading, Tensor]]
    """The unit of each input channel, -1 for others."""
    norms: list[tuple[nn.Module, Tensor]]
    """Likewise of each channel."""


class UnitWatch:
    """Finds the units of each weight of a graph that can be turned over.

    Args:
        graph_module: the model.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph_module = graph_module
        self.sites: Sites = find_sites(graph_module)
        self._groups = groups = UnitGroups(_EveryRule(whole_view(graph_module)))
        self._shared = shared_parameters(graph_module)
        self._read_besides = {id(site.parameter) for site in self.sites.reads}
        self._uses: dict[str, list[WeightSite]] = {}
        for site in (found for found in self.sites.found if not found.is_further):
            self._uses.setdefault(site.whole_path, []).append(site)
        self._sites_of: dict[Node, list[WeightSite]] = {}
        for site in self.sites.found:
            self._sites_of.setdefault(site.node, []).append(site)
        self._parameters = {path for path, _ in graph_module.named_parameters(remove_duplicate=False)}
        self._calls = Counter(str(node.target) for node in graph_module.graph.find_nodes(op="call_module"))
        self._units_of = {source: groups.representatives(source.units) for source in groups.sources}
        members = torch.full((groups.count,), -1)
        self._teams: list[list[Source]] = []
        for together in groups.connected([]):
            for member in together:
                members[self._units_of[member]] = len(self._teams)  # type: ignore[index]
            self._teams.append(together)  # type: ignore[arg-type]
        self._team_of = members
        self._nodes: dict[int, list[Node]] = {}
        for node, value in groups.values.items():
            for team in self._teams_in(value):
                self._nodes.setdefault(team, []).append(node)

    def units_of(self, site: WeightSite) -> WatchedUnits | str:
        """Return the units that a weight makes, or why they cannot be turned over."""
        path = self._maker_of(site)
        made = next((source for source in self._units_of if source.name == path), None)
        if made is None or made.kind != "layer":
            return "what its units are is not known"
        team = int(self._team_of[self._units_of[made][0]])
        try:
            return self._checked(team)
        except _StaysError as reason:
            return str(reason)

    def _teams_in(self, value: UnitValue) -> set[int]:
        found: set[int] = set()
        for entry in (value, *(value.parts or ()), *(value.tail or ())):
            if entry.layout is not None:
                found.update(
                    self._team_of[self._groups.representatives(entry.layout.labels)].unique().tolist()
                )
            if entry is not value and entry.parts:
                found |= self._teams_in(entry)
        return found - {-1}

    def _checked(self, team: int) -> WatchedUnits:
        made = sorted(self._teams[team], key=lambda source: source.first)
        for source in made:
            if source.kind != "layer":
                raise _StaysError(f"units of {source.name!r}, which no layer makes, are one with its units")
        units = torch.cat([self._units_of[source] for source in made]).unique()
        number = torch.full((self._groups.count,), -1)
        number[units] = torch.arange(len(units))
        writers: list[tuple[WeightSite, Tensor]] = []
        for source in made:
            site, rows = self._only_use(source.name, "makes"), number[self._units_of[source]]
            if not len(rows.unique()) == len(rows) == len(units) == site.output_channels:
                raise _StaysError(f"{source.name!r} makes only some of its units, or one several times")
            writers += [(own, rows.repeat(own.slot.blocks)) for own in self._that_make_with(site)]
        readers, nodes = [], set(self._nodes.get(team, ()))
        for reading in self._groups.readings:
            index = number[self._groups.representatives(reading.units)]
            if bool((index >= 0).any()):
                own = self._only_use(reading.site.whole_path, "reads")
                inside = reading.layout is None and not self._is_seen_outside(own)
                if inside or len(index) != reading.site.input_channels:
                    raise _StaysError(f"{reading.site.parameter_path!r} reads its units inside a layer")
                readers.append((reading, index))
        sources = {own.node: argument(own.node, *own.kind.source) for own in (r.site for r, _ in readers)}
        making_nodes = {site.node for site, _ in writers}
        for node in sorted(nodes):
            if node not in making_nodes:
                self._pass_through(node, nodes)
            for user in node.users:
                if user.op == "output":
                    raise _StaysError("its units are an output of the model")
                passes = user in nodes and user not in making_nodes
                is_read = sources.get(user) is node and _times(node, user) == 1
                if not passes and not is_read and not queries_metadata(user):
                    raise _StaysError(f"its units go into {user.name!r}, behind which they are not known")
        if not readers:
            raise _StaysError("no weight reads its units")
        return WatchedUnits(len(units), writers, readers, list(self._norms(nodes, number)))

    def _maker_of(self, site: WeightSite) -> str:
        """Return the path of the weight that the units which a weight makes are named after."""
        for own in self._sites_of.get(site.node, ()):
            if site.kind in RECURRENT_KINDS and own.role == "hidden" and _is_beside(own, site):
                return own.parameter_path
        return site.parameter_path

    def _that_make_with(self, site: WeightSite) -> list[WeightSite]:
        """Return a weight, and those whose products are added to what it makes inside its layer."""
        if site.kind not in RECURRENT_KINDS:
            return [site]
        state = argument(site.node, 1, "hx")
        if isinstance(state, Node) and self._groups.values[state].has_units:
            raise _StaysError(f"its units start from {state.name!r}, a state that others make")
        beside = [own for own in self._sites_of[site.node] if _is_beside(own, site)]
        if any(own.role == "projection" for own in beside):
            raise _StaysError("its units are read by a projection inside the layer")
        return [site, *(self._only_use(own.whole_path, "makes") for own in beside if own.role != "hidden")]

    def _is_seen_outside(self, site: WeightSite) -> bool:
        """Whether what a weight reads inside its layer is the layer's output."""
        layers = [own.slot.layer for own in self._sites_of[site.node]]
        return site.kind in RECURRENT_KINDS and site.role == "hidden" and site.slot.layer == max(layers)

    def _only_use(self, path: str, does: str) -> WeightSite:
        """Return the use of a weight that takes part, if it is one of a kind that is known in full."""
        uses = self._uses.get(path, [])
        reason = "it is used more than once" if len(uses) != 1 else self._why_unfit(uses[0])
        if reason is not None:
            raise _StaysError(f"{path!r} {does} its units: {reason}")
        return uses[0]

    def _why_unfit(self, site: WeightSite) -> str | None:
        """Return why entries of a weight cannot be those of units, None if they can."""
        kind = site.kind
        known = kind in RECURRENT_KINDS or not kind.is_compound
        if kind.is_product:
            known = kind.function in _PRODUCTS and kind.transposed and not kind.is_stack
        if kind.why_no_units or not known:
            return kind.why_no_units or f"a {kind.name} is not one layer with one weight"
        if site.whole_path != site.parameter_path or sum_behind(site.whole_weight_node) is not None:
            return "its weight is the sum of sub-weights"
        if site.is_computed or site.computation is not None:
            return "its weight is computed from others"
        if site.value_blocker is not None:
            return site.value_blocker
        if any(operator.target not in _KEPT for operator in site.operators):
            return "its weight is folded, or its gradient divided"
        if site.parameter.is_complex():
            return "its weight is complex"
        if id(site.parameter) in self._shared or id(site.parameter) in self._read_besides:
            return "its weight is read by others too"
        if not self._has_own_bias(site):
            return "its bias is not the layer's alone"
        return None

    def _has_own_bias(self, site: WeightSite) -> bool:
        if site.kind not in RECURRENT_KINDS and not site.kind.is_product:
            return has_own_bias(self._graph_module, site, self._shared)
        owner, _, name = site.parameter_path.rpartition(".")
        bias = bias_of(self._graph_module.get_submodule(owner), name)
        if bias is not None and id(bias) in self._shared:
            return False
        if site.node.op == "call_module":
            return True
        given = argument(site.node, 0, "input") if site.kind.function is torch.addmm else None
        if site.kind in RECURRENT_KINDS and bias is not None:
            weights, place = site.node.args[2], int(site.slot.index or 0) + 2
            given = weights[place]  # type: ignore[index]
        expected = ".".join([*([owner] if owner else []), bias_name(name)])
        is_own = isinstance(given, Node) and given.op == "get_attr" and given.target == expected
        return is_own if bias is not None else given is None

    def _pass_through(self, node: Node, nodes: set[Node]) -> None:
        """Refuse an operation that does more with units than let them through, each by itself."""
        module, values = self._module(node), self._groups.values
        rule = rule_for("units", node, module)
        whole = rule is parts.indexed and self._picks_whole(node)
        if rule in _COMBINED:
            for operand in (source for source in node.all_input_nodes if source not in nodes):
                if values[operand].is_statistic or (
                    operand.op == "get_attr" and str(operand.target) in self._parameters
                ):
                    raise _StaysError(f"its units go through {node.name!r}, which {operand.name!r} scales")
        elif rule not in _PASSED and not whole:
            raise _StaysError(f"its units go through {node.name!r}, which combines or parts them")
        if rule is layers.normalised:
            if not isinstance(module, NORMS) or self._calls[str(node.target)] > 1:
                raise _StaysError(
                    f"its units go through {node.name!r}, a normalisation that is no module's alone"
                )
            if self._channels(node, module) is None:
                raise _StaysError(f"its units go through {node.name!r}, which normalises other axes too")
            if any(id(parameter) in self._shared for parameter in module.parameters()):
                raise _StaysError(f"its units go through {node.name!r}, whose parameters others read too")
        elif module is not None and any(True for _ in (*module.parameters(), *module.buffers())):
            raise _StaysError(
                f"its units go through {node.name!r}, a {type(module).__name__} with parameters"
            )

    def _picks_whole(self, node: Node) -> bool:
        """Whether what is picked out of a value has each of its units."""
        source: Any = node.args[0]
        before, after = self._groups.values[source], self._groups.values[node].layout
        if before.layout is None:
            return before.parts is not None
        found = [
            self._groups.representatives(layout.labels).unique()
            for layout in (before.layout, after)
            if layout
        ]
        return len(found) == 2 and torch.equal(*found)

    def _norms(self, nodes: set[Node], number: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        for node in sorted(nodes):
            module = self._module(node)
            labels = self._channels(node, module) if isinstance(module, NORMS) else None
            if module is not None and labels is not None:
                yield module, number[self._groups.representatives(labels)]

    def _channels(self, node: Node, module: Any) -> Tensor | None:
        """Return the unit at each entry of a normalisation's parameters, None where it is not known."""
        layout: UnitLayout | None = self._groups.values[node].layout
        if layout is None or len(layout.axes) != 1 or layout.axes[0].dims != (0,) or layout.labels.dim() != 1:
            return None
        if isinstance(module, nn.LayerNorm) and (
            len(module.normalized_shape) != 1 or layout.axes[0].position != -1
        ):
            return None
        sizes = {len(held) for held in (*module.parameters(), *module.buffers()) if held.dim()}
        return layout.labels if sizes <= {len(layout.labels)} else None

    def _module(self, node: Node) -> nn.Module | None:
        return self._graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_beside(site: WeightSite, other: WeightSite) -> bool:
    """Whether two weights of a recurrent layer are of one of its layers, in one direction."""
    return (site.slot.layer, site.slot.direction) == (other.slot.layer, other.slot.direction)


def _times(node: Node, user: Node) -> int:
    """Return how many times a node is among the arguments of another."""
    found: list[Node] = []
    map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


class _StaysError(Exception):
    """Why units cannot be turned over."""
