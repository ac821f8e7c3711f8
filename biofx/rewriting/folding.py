"""Fold sums over synapses into the weights of layers, and carry one value per connection between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from biofx.analysis.replication import Call, Flow, Outcome, Replication, ReplicationEnds
from biofx.errors import PassError
from biofx.layers.lowering import Lowering
from biofx.layers.weight_site import WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.split_ops import fold_weight, folded_shape, require_axes, spread_synapses, sum_synapses


@dataclass(frozen=True)
class Fold:
    """How a layer's weight is summed."""

    site: WeightSite
    rows: int = 1
    """Synapses per connection among its outputs, a count; 1 leaves that side alone."""
    columns: int = 1
    """Likewise among its inputs."""
    inner: int = 1
    """Inputs that belong to one channel, a count."""

    @property
    def fits(self) -> bool:
        """Whether the groups of the layer's convolution, if it is one, hold whole connections."""
        return self._folded is not None

    @property
    def folded(self) -> tuple[tuple[int, ...], int]:
        """Shape of the folded weight and groups of its convolution.

        Raises:
            PassError: it does not fit.
        """
        if self._folded is None:
            raise PassError(f"{self.site.layer!r} cannot be folded: its groups cut connections apart")
        return self._folded

    @property
    def _folded(self) -> tuple[tuple[int, ...], int] | None:
        return folded_shape(
            tuple(self.site.parameter.shape),
            rows=self.rows,
            columns=self.columns,
            groups=self.site.groups,
            transposed=self.site.kind.transposed,
        )

    @property
    def multiplications(self) -> tuple[int, int]:
        """Multiply-adds for one position of the kernel (one vector, in a linear layer), before and after."""
        shape, _ = self.folded
        return self.site.parameter.numel(), math.prod(shape)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``fold_weight``, those that say nothing new left out."""
        neutral = {"rows": 1, "columns": 1, "inner": 1, "groups": 1, "transposed": False}
        given = {
            "rows": self.rows,
            "columns": self.columns,
            "inner": self.inner,
            "groups": self.site.groups,
            "transposed": self.site.kind.transposed,
        }
        return {name: value for name, value in given.items() if value != neutral[name]}


def columns_of(site: WeightSite, source: Replication) -> tuple[int, int]:
    """Return the synapses per connection among a layer's inputs, and how many inputs make up a channel.

    Raises:
        ReplicationEnds: the layer needs its inputs apart.
    """
    channels = source.groups * source.gamma
    inner, rest = divmod(site.input_channels, channels)
    if rest or (inner != 1 and not (source.inner and site.kind.kernel_axes == 0)):
        raise ReplicationEnds(f"it has {site.input_channels} inputs, which are not the {channels} channels")
    if not Fold(site, columns=source.gamma, inner=inner).fits:
        raise ReplicationEnds(f"its {site.groups} groups do not hold whole connections of {source.gamma}")
    return source.gamma, inner


def consume(call: Call, site: WeightSite) -> Outcome:
    """Say what a layer makes of a compact input: it sums columns, or works along another axis."""
    source = call.source
    if source.axis == site.kind.channel_axis:
        columns_of(site, source)
        return Outcome(None)
    if site.kind.kernel_axes:
        raise ReplicationEnds("it takes its channels from another axis")
    return Outcome(source)


class Folding:
    """Rewrites a graph along a flow of compact values.

    Args:
        graph_module: the graph.
        flow: where values are compact.
        folds: the layers whose weights are summed.
        rewriting: returns a context in which all changes belong to a candidate (:meth:`Scope.rewriting`).
    """

    def __init__(
        self,
        graph_module: BioGraphModule,
        flow: Flow,
        folds: Mapping[Node, Fold],
        rewriting: Callable[[Node], AbstractContextManager[None]],
    ) -> None:
        self._graph_module = graph_module
        self._flow = flow
        self._folds = folds
        self._lowering = Lowering(graph_module)
        self._rewriting = rewriting
        self._compact: dict[Node, Replication] = {}
        self._begins: dict[Node, Node] = {}
        self._made: dict[tuple[Any, ...], Node] = {}

    def run(self, pools: Mapping[Node, Node | None]) -> None:
        """Rewrite every node that the flow tells of.

        Args:
            pools: each pool of synapses that begins a replication, with the layer that takes its sum over;
                None where no layer can.
        """
        for node in list(self._graph_module.graph.nodes):
            outcome = self._flow.outcomes.get(node)
            inputs = [source for source in node.all_input_nodes if source in self._compact]
            begin = next((self._begins[source] for source in inputs), node)
            if node in self._flow.ends:
                with self._rewriting(begin):
                    for source in inputs:
                        node.replace_input_with(source, self._spread(source))
            with self._rewriting(node):
                if outcome is not None and node not in self._flow.ends:
                    self._edit(node, outcome, inputs)
                if node in self._folds:
                    self._fold(self._folds[node])
            if outcome is not None and outcome.replication is not None:
                compact = node
                if node in pools:
                    begin = pools[node] or node
                    with self._rewriting(begin):
                        compact = self._begun(node, pools)
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

    def _insert_for(self, reader: Node, source: Node, name: str, target: Callable[..., Any]) -> Node:
        """Insert what is computed from a weight or a bias in the context of the node that reads it."""
        ahead = self._lowering.contexts.place_for(reader, (source,))
        made = self.insert_after(ahead.prev, name, target)
        made.meta = {key: value for key, value in source.meta.items() if key == "nn_module_stack"}
        return made

    def _begun(self, pool: Node, pools: Mapping[Node, Node | None]) -> Node:
        layer = pools[pool]
        if layer is None:
            pool.target = sum_synapses
            return pool
        pool.replace_all_uses_with(layer)
        pool.graph.erase_node(pool)
        return layer

    def _spread(self, source: Node) -> Node:
        key = ("spread", source)
        if key not in self._made:
            made = self.insert_after(source, f"{source.name}_spread", spread_synapses)
            made.args, made.kwargs = (source,), dict(self._compact[source].spread)
            self._made[key] = made
        return self._made[key]

    def _checked(self, source: Node, count: int) -> Node:
        key = ("checked", source, count)
        if key not in self._made:
            made = self.insert_after(source, f"{source.name}_checked", require_axes)
            made.args = (source, count)
            self._made[key] = made
        return self._made[key]

    def _fold(self, fold: Fold) -> None:
        """Let a layer compute with the folded weight and bias."""
        site, node = fold.site, fold.site.node
        self._lowering.lower(site)
        weight = site.weight_node
        stem = site.parameter_path.removesuffix(".weight").replace(".", "_")
        context = self._lowering.contexts.around(node)
        key: tuple[Any, ...] = ("weight", weight, context, *fold.options.items())
        if weight is not None and key not in self._made:
            folded = self._insert_for(node, weight, f"{stem}_folded", fold_weight)
            folded.args, folded.kwargs = (weight,), fold.options
            self._made[key] = folded
        self._replace_argument(node, "weight", 1, self._made[key])
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if fold.rows > 1 and isinstance(bias, Node):
            key = ("bias", bias, context, fold.rows)
            if key not in self._made:
                summed = self._insert_for(node, bias, f"{bias.name}_folded", sum_synapses)
                summed.args, summed.kwargs = (bias,), {"gamma": fold.rows, "channel_axis": -1}
                self._made[key] = summed
            self._replace_argument(node, "bias", 2, self._made[key])
        _, groups = fold.folded
        if groups != site.groups:
            self._replace_argument(node, "groups", 6, groups)
            if groups == 1:
                node.kwargs = {name: value for name, value in node.kwargs.items() if name != "groups"}

    def _replace_argument(self, node: Node, name: str, place: int, value: Any) -> None:
        if len(node.args) > place:
            node.update_arg(place, value)
        else:
            node.update_kwarg(name, value)
