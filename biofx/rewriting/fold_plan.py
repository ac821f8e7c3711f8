"""Decide what is folded of a graph's pools of synapses, before anything of the graph is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch.fx import Node

from biofx.analysis.replication import Call, Flow, Outcome, Replication, ReplicationEnds, Rule, follow
from biofx.analysis.replication_rules import rule_for, works_by_element
from biofx.layers.sites import innermost_path
from biofx.layers.weight_site import Sites, WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.rate_ops import observe_activity
from biofx.operators.split_ops import pool_synapses
from biofx.rewriting.activation import SPLITTING_ACTIVATION
from biofx.rewriting.folding import Fold, columns_of, consume
from biofx.rewriting.remarks import Remark, applied, missed

_TAKEN_OVER = "taken over by the weights of its layer; one value per connection is carried on"
_NOT_INVOLVED = "neither its inputs nor its outputs are synapses that can be folded"
_CARRIED = "computes one value per connection"
_NO_USE = "nothing that reads it can take one value per connection"


class FoldPlan:
    """What is to be folded.

    Args:
        graph_module: the graph, which is only looked at.
        sites: its weight sites.
        left_alone: sites that are not to be folded, with the reason.
    """

    def __init__(self, graph_module: BioGraphModule, sites: Sites, left_alone: Mapping[Node, str]) -> None:
        self._graph_module = graph_module
        self._sites = {site.node: site for site in sites.found if not site.kind.why_no_units}
        self._bystanders = sites.bystanders
        obstacles = {site.node: site.obstacle for site in sites.found if site.obstacle is not None}
        compound = {
            site.node: f"{site.kind.name} has several weights, which read different inputs"
            for site in sites.found
            if site.kind.is_compound
        }
        products = {
            site.node: f"its weight is a factor of {site.kind.name}, and is not folded"
            for site in sites.found
            if site.kind.is_product
        }
        self._left_alone = {**compound, **products, **obstacles, **left_alone}
        self.folds: dict[Node, Fold] = {}
        self.flow = Flow({}, {})
        pools = graph_module.graph.find_nodes(op="call_function", target=pool_synapses)
        self._pools = {pool: self._site_behind(pool) for pool in pools}

    def settle(self) -> dict[Node, Node | None]:
        """Return the pools that are folded, each with the layer that takes its sum over, if one can."""
        starts = {pool: made for pool in self._pools if (made := self._replication(pool)) is not None}
        while True:
            self.flow = follow(self._graph_module, starts, self._rule_for)
            self._fold_columns()
            layers = {pool: self._fold_rows(pool) for pool in starts if pool in self.flow.outcomes}
            idle = [pool for pool, layer in layers.items() if layer is None and not self._is_of_use(pool)]
            if not idle:
                return layers
            for pool in idle:
                del starts[pool]

    def remarks(self, pools: dict[Node, Node | None]) -> Iterator[Remark]:
        """Yield what is done with each pool, and with each node that it reaches."""
        for pool, site in self._pools.items():
            layer = "" if site is None else site.layer
            reason = self._why_rows_stay(pool)
            if pool not in pools and pool not in self.flow.ends:
                yield missed(pool, layer, f"not folded: {reason or _NO_USE}")
            elif pool in pools:
                what = f"summed once for all members; {reason}" if pools[pool] is None else _TAKEN_OVER
                yield applied(pool, layer, what)
        for fold in self.folds.values():
            before, after = fold.multiplications
            yield applied(
                fold.site.node,
                fold.site.layer,
                f"{_sides(fold)} summed: {before} multiply-adds per position become {after}",
                before=before,
                after=after,
                rows=fold.rows,
                columns=fold.columns,
            )
        for node, outcome in self.flow.outcomes.items():
            if outcome.edit is not None or outcome.needs_rank is not None:
                yield applied(node, innermost_path(node), outcome.message or _CARRIED)
        for node, reason in self.flow.ends.items():
            path = self._sites[node].layer if node in self._sites else innermost_path(node)
            yield missed(node, path, f"members are set apart for it: {reason}")
        for node, site in self._sites.items():
            if node not in self.folds and node not in self.flow.ends:
                yield missed(node, site.layer, self._left_alone.get(node, _NOT_INVOLVED))
        for bystander in self._bystanders:
            yield missed(bystander.node, bystander.layer, bystander.reason)

    def _replication(self, pool: Node) -> Replication | None:
        """Return what a pool makes, None where how many connections that is cannot be known."""
        site = self._pools[pool]
        axis: int = pool.kwargs["channel_axis"]  # type: ignore[assignment]
        gamma: int = pool.kwargs["gamma"]  # type: ignore[assignment]
        if site is None or axis != site.kind.channel_axis or site.output_channels % gamma:
            return None
        rank = site.kind.kernel_axes + 2 if site.kind.kernel_axes else None
        return Replication(axis, gamma, site.output_channels // gamma, rank)

    def _site_behind(self, pool: Node) -> WeightSite | None:
        """Return the layer whose synapses a pool sums, None where more than an activation lies between."""
        node = pool.args[0]
        while isinstance(node, Node) and node not in self._sites:
            own = node.op == "call_module" and str(node.target).endswith(SPLITTING_ACTIVATION)
            known = own or node.target is observe_activity or works_by_element(node, self._graph_module)
            node = node.args[0] if known and node.args else None
        return self._sites[node] if isinstance(node, Node) else None

    def _rule_for(self, node: Node) -> tuple[str, Rule | None]:
        site = self._sites.get(node)
        if site is None:
            return rule_for(node, self._graph_module)

        def rule(call: Call) -> Outcome:
            if node in self._left_alone:
                raise ReplicationEnds(self._left_alone[node])
            return consume(call, site)

        return site.kind.name, rule

    def _fold_columns(self) -> None:
        """Plan the folds on the side of the inputs."""
        self.folds = {}
        for node, outcome in self.flow.outcomes.items():
            site = self._sites.get(node)
            if site is not None and outcome.replication is None:
                (source,) = filter(None, map(self._carried, node.all_input_nodes))
                columns, inner = columns_of(site, source)
                self.folds[node] = Fold(site, columns=columns, inner=inner)

    def _fold_rows(self, pool: Node) -> Node | None:
        """Plan the fold on the side of the outputs, and return the layer; None where there is none."""
        site = self._pools[pool]
        if site is None or self._why_rows_stay(pool) is not None:
            return None
        self.folds[site.node] = self._with_rows(pool, site)
        return site.node

    def _why_rows_stay(self, pool: Node) -> str | None:
        site = self._pools[pool]
        if site is None:
            return "it does not sum the output of a layer"
        if isinstance(pool.args[0], Node) and pool.args[0].target is observe_activity:
            return f"rows of {site.layer} stay: its synapses are observed one by one"
        if pool.args[0] is not site.node:
            return f"rows of {site.layer} stay: the activation before the sum is not linear"
        if site.node in self._left_alone:
            return f"rows of {site.layer} stay: {self._left_alone[site.node]}"
        if list(site.node.users) != [pool]:
            return f"rows of {site.layer} stay: its synapses are read by others too, one by one"
        if self._carried(site.node) is not None:
            return f"rows of {site.layer} stay: it acts along another axis than its input's channels"
        if not self._with_rows(pool, site).fits:
            return f"rows of {site.layer} stay: its {site.groups} groups do not hold whole connections"
        return None

    def _with_rows(self, pool: Node, site: WeightSite) -> Fold:
        rows: int = pool.kwargs["gamma"]  # type: ignore[assignment]
        return dataclasses.replace(self.folds.get(site.node, Fold(site)), rows=rows)

    def _is_of_use(self, pool: Node) -> bool:
        return any(user in self.flow.outcomes for user in pool.users)

    def _carried(self, node: Node) -> Replication | None:
        outcome = self.flow.outcomes.get(node)
        return None if outcome is None else outcome.replication


def _sides(fold: Fold) -> str:
    rows = f"rows in groups of {fold.rows}" if fold.rows > 1 else ""
    columns = f"columns in groups of {fold.columns}" if fold.columns > 1 else ""
    return " and ".join(filter(None, (rows, columns)))
