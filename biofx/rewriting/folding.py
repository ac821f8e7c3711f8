"""Fold sums over synapses into the weights of layers, and carry one value per connection between them.

A :class:`FoldPlan` decides what is folded before anything of the graph is changed; :class:`Folding` does it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from biofx.analysis.replication import Outcome, Replication, ReplicationAnalysis
from biofx.analysis.rules_elementwise import works_by_element
from biofx.analysis.rules_weights import columns_of, folded_weight
from biofx.layers.lowering import Lowering
from biofx.layers.sites import innermost_path
from biofx.layers.weight_site import Sites, WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.rate_ops import observe_activity
from biofx.operators.split_ops import (
    fold_weight,
    pool_synapses,
    require_axes,
    spread_synapses,
    sum_synapses,
)
from biofx.rewriting.activation import SPLITTING_ACTIVATION
from biofx.rewriting.remarks import Remark, applied, missed

_TAKEN_OVER = "taken over by the weights of its layer; one value per connection is carried on"
_NOT_INVOLVED = "neither its inputs nor its outputs are synapses that can be folded"
_CARRIED = "computes one value per connection"
_NO_USE = "nothing that reads it can take one value per connection"


@dataclass(frozen=True)
class Fold:
    """How a layer's weight is summed."""

    site: WeightSite
    rows: int = 1
    """Synapses of a connection among its outputs, a count; 1 leaves that side alone."""
    columns: int = 1
    """Synapses of a connection among its inputs, a count."""
    inner: int = 1
    """Inputs that belong to one channel, a count."""

    @property
    def folded(self) -> tuple[tuple[int, ...], int] | None:
        """Shape of the folded weight and groups of its convolution; None where they cut connections apart."""
        return folded_weight(self.site, rows=self.rows, columns=self.columns)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``fold_weight`` that differ from its defaults."""
        given = {"rows": self.rows, "columns": self.columns, "inner": self.inner, "groups": self.site.groups}
        options: dict[str, Any] = {name: value for name, value in given.items() if value != 1}
        return {**options, "transposed": True} if self.site.kind.transposed else options

    @property
    def sides(self) -> str:
        """What is summed, in words."""
        rows = f"rows in groups of {self.rows}" if self.rows > 1 else ""
        columns = f"columns in groups of {self.columns}" if self.columns > 1 else ""
        return " and ".join(filter(None, (rows, columns)))


class FoldPlan:
    """What is to be folded of a graph, decided without changing it.

    Args:
        graph_module: the graph.
        sites: its weight sites.
        left_alone: sites that are not to be folded, with the reason.
        among: the pools of synapses to look at; None for all.
    """

    def __init__(
        self,
        graph_module: BioGraphModule,
        sites: Sites,
        left_alone: Mapping[Node, str],
        among: Set[Node] | None = None,
    ) -> None:
        self._graph_module = graph_module
        units = [site for site in sites.found if not site.kind.why_no_units and not site.is_further]
        self._sites = {site.node: site for site in units}
        self._unsupported = sites.unsupported
        reasons = {site.node: why for site in sites.found if (why := _why_not(site)) is not None}
        self._left_alone = {**reasons, **left_alone}
        pools = graph_module.graph.find_nodes(op="call_function", target=pool_synapses)
        self._all_pools = {pool: self._site_behind(pool) for pool in pools if among is None or pool in among}
        starts = {pool: made for pool in self._all_pools if (made := self._replication(pool)) is not None}
        while True:
            self.reached = ReplicationAnalysis(graph_module, starts, self._sites, self._left_alone)
            """How far one value for each connection is carried."""
            self.folds = self._column_folds()
            """How each layer that is folded is folded."""
            self.pools = {pool: self._fold_rows(pool) for pool in starts if pool in self.reached.values}
            """The pools that are folded, each with the layer whose weight takes its sum, if one does."""
            idle = [pool for pool, layer in self.pools.items() if layer is None and not self._is_of_use(pool)]
            if not idle:
                break
            for pool in idle:
                del starts[pool]

    def remarks(self) -> Iterator[Remark]:
        """Yield what is done with each pool, and with each node that it reaches."""
        for pool, site in self._all_pools.items():
            layer = "" if site is None else site.layer
            reason = self._why_rows_stay(pool)
            if pool not in self.pools and pool not in self.reached.ended:
                yield missed(pool, layer, f"not folded: {reason or _NO_USE}")
            elif pool in self.pools:
                summed = f"summed once for all members; {reason}"
                yield applied(pool, layer, summed if self.pools[pool] is None else _TAKEN_OVER)
        for fold in self.folds.values():
            shape, _ = fold.folded or ((), 1)
            before, after = fold.site.parameter.numel(), math.prod(shape)
            yield applied(
                fold.site.node,
                fold.site.layer,
                f"{fold.sides} summed: {before} multiply-adds per position become {after}",
                before=before,
                after=after,
                rows=fold.rows,
                columns=fold.columns,
            )
        for node, outcome in self.reached.values.items():
            if outcome.edit is not None or outcome.needs_rank is not None:
                yield applied(node, innermost_path(node), outcome.message or _CARRIED)
        for node, reason in self.reached.ended.items():
            path = self._sites[node].layer if node in self._sites else innermost_path(node)
            yield missed(node, path, f"members are set apart for it: {reason}")
        for node, site in self._sites.items():
            if node not in self.folds and node not in self.reached.ended:
                yield missed(node, site.layer, self._left_alone.get(node, _NOT_INVOLVED))
        for entry in self._unsupported:
            yield missed(entry.node, entry.layer, entry.reason)

    def _replication(self, pool: Node) -> Replication | None:
        """Return what a pool makes, None where its number of connections cannot be known."""
        site = self._all_pools[pool]
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

    def _column_folds(self) -> dict[Node, Fold]:
        """Return the folds on the side of the inputs."""
        folds = {}
        for node, outcome in self.reached.values.items():
            site = self._sites.get(node)
            if site is not None and outcome.replication is None:
                (source,) = filter(None, map(self.reached.carried, node.all_input_nodes))
                columns, inner = columns_of(site, source)
                folds[node] = Fold(site, columns=columns, inner=inner)
        return folds

    def _fold_rows(self, pool: Node) -> Node | None:
        """Plan the fold on the side of the outputs, and return the layer; None where there is none."""
        site = self._all_pools[pool]
        if site is None or self._why_rows_stay(pool) is not None:
            return None
        self.folds[site.node] = self._with_rows(pool, site)
        return site.node

    def _why_rows_stay(self, pool: Node) -> str | None:
        site, source = self._all_pools[pool], pool.args[0]
        if site is None:
            return "it does not sum the output of a layer"
        if isinstance(source, Node) and source.target is observe_activity:
            reason = "its synapses are observed one by one"
        elif source is not site.node:
            reason = "the activation before the sum is not linear"
        elif site.node in self._left_alone:
            reason = self._left_alone[site.node]
        elif list(site.node.users) != [pool]:
            reason = "its synapses are read by others too, one by one"
        elif self.reached.carried(site.node) is not None:
            reason = "it acts along another axis than its input's channels"
        elif self._with_rows(pool, site).folded is None:
            reason = f"its {site.groups} groups do not hold whole connections"
        else:
            return None
        return f"rows of {site.layer} stay: {reason}"

    def _with_rows(self, pool: Node, site: WeightSite) -> Fold:
        rows: int = pool.kwargs["gamma"]  # type: ignore[assignment]
        return dataclasses.replace(self.folds.get(site.node, Fold(site)), rows=rows)

    def _is_of_use(self, pool: Node) -> bool:
        return any(user in self.reached.values for user in pool.users)


def _why_not(site: WeightSite) -> str | None:
    """Return why a weight cannot be folded, None if it can."""
    if site.value_blocker is not None:
        return site.value_blocker
    if site.computation is not None and site.computation.is_turned:
        return f"its weight is transposed in the forward ({site.computation.words}), and is not folded"
    if site.kind.is_product:
        return f"its weight is a factor of {site.kind.name}, and is not folded"
    if site.kind.is_compound:
        return f"{site.kind.name} has several weights, which read different inputs"
    return None


class Folding:
    """Rewrites a graph as a plan says.

    Args:
        graph_module: the graph.
        plan: what is to be folded of it.
        rewriting: returns a context in which all changes belong to a candidate
            (:meth:`~biofx.Scope.rewriting`).
    """

    def __init__(
        self,
        graph_module: BioGraphModule,
        plan: FoldPlan,
        rewriting: Callable[[Node], AbstractContextManager[None]],
    ) -> None:
        self._graph_module = graph_module
        self._plan = plan
        self._rewriting = rewriting
        self._begins: dict[Node, Node] = {}
        self._lowering = Lowering(graph_module)
        self._compact: dict[Node, Replication] = {}
        self._made: dict[tuple[Any, ...], Node] = {}

    def run(self) -> None:
        """Rewrite every node that a compact value reaches, and the layers that are folded."""
        reached, pools = self._plan.reached, self._plan.pools
        for node in list(self._graph_module.graph.nodes):
            outcome = reached.values.get(node)
            inputs = [source for source in node.all_input_nodes if source in self._compact]
            begin = next((self._begins[source] for source in inputs), node)
            if node in reached.ended:
                with self._rewriting(begin):
                    for source in inputs:
                        node.replace_input_with(source, self._spread(source))
            with self._rewriting(node):
                if outcome is not None:
                    self._edit(node, outcome, inputs)
                if node in self._plan.folds:
                    self._fold(self._plan.folds[node])
            if outcome is not None and outcome.replication is not None:
                compact = node
                if node in pools:
                    begin = pools[node] or node
                    with self._rewriting(begin):
                        compact = self._begun(node, pools[node])
                self._compact[compact], self._begins[compact] = outcome.replication, begin

    def _edit(self, node: Node, outcome: Outcome, inputs: list[Node]) -> None:
        if outcome.needs_rank is not None:
            for source in inputs:
                node.replace_input_with(source, self._checked(source, outcome.needs_rank))
        if outcome.edit is not None:
            outcome.edit(self)

    def read(self, path: str, before: Node) -> Node:
        """Return a node that reads a parameter, a buffer or a flag, ahead of another node."""
        return self._lowering.read(path, before)

    def setting_of(self, node: Node, name: str) -> Node:
        """Return a node that reads a setting of the module that a node calls."""
        return self._lowering.setting_of(node, name)

    def insert_after(self, place: Node, name: str, target: Callable[..., Any]) -> Node:
        """Insert a call of ``target``, whose arguments are still to be set."""
        with place.graph.inserting_after(place):
            made = place.graph.create_node("call_function", target, (), {}, name)
        made.meta = {key: value for key, value in place.meta.items() if key == "nn_module_stack"}
        return made

    def _begun(self, pool: Node, layer: Node | None) -> Node:
        """Return the node whose value is compact from now on: the layer itself, or a sum."""
        if layer is None:
            pool.target = sum_synapses
            return pool
        pool.replace_all_uses_with(layer)
        pool.graph.erase_node(pool)
        return layer

    def _spread(self, source: Node) -> Node:
        return self._once(spread_synapses, source, f"{source.name}_spread", **self._compact[source].spread)

    def _checked(self, source: Node, count: int) -> Node:
        return self._once(require_axes, source, f"{source.name}_checked", count)

    def _once(
        self,
        target: Callable[..., Any],
        source: Node,
        name: str,
        *args: Any,
        reader: Node | None = None,
        **kwargs: Any,
    ) -> Node:
        """Return a call of ``target`` on a node's value, one for all that need it.

        It stands behind ``source``, or ahead of ``reader`` in the context of that.
        """
        contexts = self._lowering.contexts
        context = None if reader is None else contexts.around(reader)
        key = (target, source, context, *args, *kwargs.items())
        if key not in self._made:
            place = source if reader is None else contexts.place_for(reader, (source,)).prev
            made = self._made[key] = self.insert_after(place, name, target)
            made.args, made.kwargs = (source, *args), kwargs
            made.meta = {key: value for key, value in source.meta.items() if key == "nn_module_stack"}
        return self._made[key]

    def _fold(self, fold: Fold) -> None:
        """Let a layer compute with the folded weight and bias."""
        site, node = fold.site, fold.site.node
        self._lowering.lower(site)
        if (weight := site.whole_weight_node) is not None:
            stem = site.parameter_path.removesuffix(".weight").replace(".", "_")
            folded = self._once(fold_weight, weight, f"{stem}_folded", reader=node, **fold.options)
            self._replace_argument(node, "weight", 1, folded)
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if fold.rows > 1 and isinstance(bias, Node):
            summed = self._once(
                sum_synapses, bias, f"{bias.name}_folded", reader=node, gamma=fold.rows, channel_axis=-1
            )
            self._replace_argument(node, "bias", 2, summed)
        _, groups = fold.folded or ((), site.groups)
        if groups != site.groups:
            self._replace_argument(node, "groups", 6, groups)
            if groups == 1:
                node.kwargs = {name: value for name, value in node.kwargs.items() if name != "groups"}

    def _replace_argument(self, node: Node, name: str, place: int, value: Any) -> None:
        if len(node.args) > place:
            node.update_arg(place, value)
        else:
            node.update_kwarg(name, value)
