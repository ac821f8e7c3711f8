"""The analysis of replication: which values of a split graph repeat each channel, and how far they do.

A pool of synapses gives every member of a connection the same value. What computes channel by channel keeps
it so: the value can be carried once for each connection until an operation needs the members apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.fx import GraphModule, Node

from biofx.analysis.forward import TABLE, Call, CannotFollow, ForwardAnalysis, rule_for
from biofx.analysis.synapses import short_name
from biofx.graph.node_kinds import changes_in_place, is_number
from biofx.graph.regions import region_output
from biofx.layers.layer_kind import LayerKind, hooks_of
from biofx.layers.weight_site import WeightSite


@dataclass(frozen=True)
class Replication:
    """A tensor that holds each connection's value once for every member."""

    axis: int
    """The axis of the channels, counted from the end."""
    gamma: int
    """Members of a connection, neighbours along the axis, a count."""
    groups: int
    """Connections, a count."""
    rank: int | None
    """Number of axes of a batch of such values; None where a layer takes any."""
    rank_is_sure: bool = False
    """Whether an operation on the way has checked that."""
    inner: bool = False
    """Whether each channel is more than one value along the axis, as behind a flatten."""

    @property
    def spread(self) -> dict[str, Any]:
        """The arguments of ``spread_synapses`` that make the full value of the compact one."""
        return {"gamma": self.gamma, "channel_axis": self.axis, "groups": self.groups}

    def matches(self, other: Replication) -> bool:
        """Whether both hold the same number of members and connections at the same place."""
        mine = (self.axis, self.gamma, self.groups, self.inner)
        return mine == (other.axis, other.gamma, other.groups, other.inner)

    def replace(self, **changes: Any) -> Replication:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


Edit: TypeAlias = Callable[[Any], None]
"""Changes a node so that it computes with the compact value; called with a ``Folding``."""


@dataclass(frozen=True)
class Outcome:
    """What an operation makes of compact inputs."""

    replication: Replication | None
    """Of its result; None where it takes compact inputs and gives an ordinary value."""
    edit: Edit | None = None
    needs_rank: int | None = None
    """Number of axes that its inputs must have, where that has yet to be checked."""
    message: str = ""
    """What is gained, for the report; empty where there is nothing to say."""


class ReplicationCall(Call):
    """A node with compact inputs, as a rule of the replication analysis sees it."""

    def __init__(
        self,
        node: Node,
        module: nn.Module | None,
        inputs: Mapping[Node, Replication],
        analysis: ReplicationAnalysis,
    ) -> None:
        super().__init__(node, module)
        self.inputs = inputs
        self.analysis = analysis
        self.needs_rank: int | None = None

    @property
    def source(self) -> Replication:
        """The replication of the one compact input, which is the first argument."""
        if len(self.inputs) != 1 or not isinstance(self.first, Node) or self.first not in self.inputs:
            raise CannotFollow("it takes more than one tensor")
        return self.inputs[self.first]

    @property
    def site(self) -> WeightSite:
        """The weight of a layer."""
        return self.analysis.sites[self.node]

    @property
    def tensors(self) -> list[Node]:
        """The nodes among the arguments, without those that are numbers."""
        nodes = self.node.all_input_nodes
        return [node for node in nodes if not is_number(self.analysis.graph_module, node)]

    def fixed(self, place: int, name: str, default: Any = None) -> Any:
        """Return an option that must be known now, not only when the graph runs."""
        value = self.option(place, name, default)
        if any(isinstance(e, Node) for e in (value if isinstance(value, (tuple, list)) else (value,))):
            raise CannotFollow(f"its {name} is known only when it runs")
        return value

    def from_end(self, axis: Any, source: Replication) -> int:
        """Return an axis counted from the end; one counted from the front needs the number of axes."""
        if not isinstance(axis, int):
            raise CannotFollow("its axes are known only when it runs")
        return axis if axis < 0 else axis - self.rank(source)

    def rank(self, source: Replication) -> int:
        """Return the number of axes of a batch, which the rewritten graph is to check."""
        if source.rank is None:
            raise CannotFollow("it counts axes from the front, and how many there are is open")
        if not source.rank_is_sure:
            self.needs_rank = source.rank
        return source.rank

    def constant(self, node: Node) -> torch.Tensor | None:
        """Return the parameter or buffer that a node reads, None if it is something else."""
        value: Any = self.analysis.graph_module
        for part in str(node.target).split(".") if node.op == "get_attr" else ():
            value = getattr(value, part, None)
        return value if isinstance(value, torch.Tensor) else None


ReplicationRule: TypeAlias = Callable[[ReplicationCall], Outcome]
"""Says what an operation makes of compact inputs.

Raises :class:`~biofx.analysis.forward.CannotFollow` with the reason why it needs the members apart.
"""


class ReplicationAnalysis(ForwardAnalysis[Outcome]):
    """How far replications reach, from where they begin to where they end.

    Args:
        graph_module: a lintable graph.
        starts: nodes that make a replication, and which.
        sites: the layers with one weight, by their nodes.
        left_alone: sites that are not to be folded, with the reason.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        starts: Mapping[Node, Replication],
        sites: Mapping[Node, WeightSite],
        left_alone: Mapping[Node, str],
    ) -> None:
        super().__init__(graph_module)
        self.sites = sites
        self._starts = starts
        self._left_alone = left_alone
        self._written = written_besides(graph_module)
        self.walk()

    def carried(self, node: Node) -> Replication | None:
        """Return the replication of a node's value, None if it is an ordinary one."""
        outcome = self.values.get(node)
        return None if outcome is None else outcome.replication

    def value_of(self, node: Node) -> Outcome | None:
        """Return what a node makes of compact inputs, None if it has none and begins nothing."""
        inputs = {source: made for source in node.all_input_nodes if (made := self.carried(source))}
        start = self._starts.get(node) if node not in self._written else None
        outcome = self._judged(node, inputs) if inputs else None
        if start is None:
            return outcome
        return Outcome(start) if outcome is None else outcome

    def _judged(self, node: Node, inputs: Mapping[Node, Replication]) -> Outcome:
        if node in self._written:
            raise CannotFollow("its value is changed in place while others read it")
        if node.op == "output":
            raise CannotFollow("the model returns it")
        if node.target is region_output:
            raise CannotFollow(f"what follows is not known: Python calls {node.args[0]!r}")
        module = self.module_of(node)
        rule, name = self._rule_for(node, module)
        if rule is None:
            raise CannotFollow(f"{name} may mix channels, or is not known to keep them apart")
        if module is not None and hooks_of(module):
            raise CannotFollow(
                f"it has {' and '.join(hooks_of(module))}, which would see the folded channels"
            )
        if node in self.sites and node in self._left_alone:
            raise CannotFollow(self._left_alone[node])
        call = ReplicationCall(node, module, inputs, self)
        outcome = rule(call)
        made = outcome.replication
        if call.needs_rank is not None and made is not None:
            made = made.replace(rank_is_sure=True)
        return dataclasses.replace(outcome, replication=made, needs_rank=call.needs_rank)

    def _rule_for(self, node: Node, module: nn.Module | None) -> tuple[ReplicationRule | None, str]:
        """Return the rule for a node, None if it has none, and the name of its operation."""
        if node in self.sites:
            return TABLE[LayerKind].replication, self.sites[node].kind.name
        is_own = module is not None and (
            "forward" in vars(module) or not type(module).__module__.startswith("torch.nn.modules")
        )
        rule = None if is_own else rule_for("replication", node, module)
        return rule, short_name(node, self.graph_module)


_MAY_SHARE_MEMORY = frozenset(
    {
        *("identity", "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "detach"),
        *("flatten", "view", "reshape", "view_as", "unflatten", "squeeze", "unsqueeze", "transpose"),
        *("permute", "movedim", "getitem", "narrow", "select", "chunk", "split", "unbind", "expand"),
        *("expand_as", "dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout"),
        *("observe_activity", "observe_inputs", "getattr"),
    }
)


def written_besides(graph_module: GraphModule) -> set[Node]:
    """Return the nodes whose value an operation changes in place while another reads it too."""
    written: set[Node] = set()
    for node in graph_module.graph.nodes:
        if not changes_in_place(node):
            continue
        first = node.args[0] if node.args else node.kwargs.get("input")
        base = node.kwargs.get("out", first)
        while isinstance(base, Node):
            if len(base.users) > 1:
                written.add(base)
            shares = short_name(base, graph_module) in _MAY_SHARE_MEMORY or changes_in_place(base)
            base = base.args[0] if shares and base.args else None
    return written
