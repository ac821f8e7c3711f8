"""Which values of a graph repeat each channel, and how far through the graph they do.

A pool of synapses gives every member of a connection the same value. What computes channel by channel keeps
it so: the value can be carried once per connection until someone needs the members apart. This module asks,
node by node, what an operation makes of such a value; the answers are rules, in a table of their own
(:mod:`biofx.replication_rules`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.fx import GraphModule, Node

from biofx.analysis.dataflow import short_name
from biofx.graph.node_kinds import changes_in_place, is_number
from biofx.graph.regions import region_output
from biofx.layers.obstacles import hooks_of


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
    """Whether something on the way has made sure of that."""
    inner: bool = False
    """Whether each channel is more than one value along the axis, as behind a flatten."""

    @property
    def spread(self) -> dict[str, int]:
        """How the compact value becomes the full one: arguments of ``spread_synapses``."""
        return {"gamma": self.gamma, "channel_axis": self.axis, "groups": self.groups}

    def matches(self, other: Replication) -> bool:
        """Whether both hold the same number of members and connections at the same place."""
        mine = (self.axis, self.gamma, self.groups, self.inner)
        return mine == (other.axis, other.gamma, other.groups, other.inner)


class ReplicationEnds(Exception):  # noqa: N818
    """Says why an operation needs the members apart; raised by rules, caught by :func:`follow`."""


Edit: TypeAlias = Callable[[Any], None]
"""Changes a node so that it computes with the compact value; called with a ``Folding``."""


@dataclass(frozen=True)
class Outcome:
    """What an operation makes of compact inputs."""

    replication: Replication | None
    """Of its result; None where it takes compact inputs and gives an ordinary value."""
    edit: Edit | None = None
    needs_rank: int | None = None
    """Number of axes that its inputs must have for this to hold, where that has yet to be made sure of."""
    message: str = ""
    """What was gained, for the report; empty where there is nothing to say."""


@dataclass
class Call:
    """A node with compact inputs, as a rule sees it."""

    node: Node
    name: str
    module: nn.Module | None
    inputs: Mapping[Node, Replication]
    graph_module: GraphModule
    needs_rank: int | None = field(default=None, init=False)

    @property
    def source(self) -> Replication:
        """The replication of the one compact input, which is the first argument."""
        first = self.node.args[0] if self.node.args else next(iter(self.node.kwargs.values()), None)
        if len(self.inputs) != 1 or first not in self.inputs or not isinstance(first, Node):
            raise ReplicationEnds("it takes more than one tensor")
        return self.inputs[first]

    @property
    def tensors(self) -> list[Node]:
        """The nodes among the arguments, without those that stand for a number."""
        return [node for node in self.node.all_input_nodes if not is_number(self.graph_module, node)]

    def option(self, name: str, place: int, default: Any = None) -> Any:
        """Return an option: a module's attribute, or a function's argument by keyword or place."""
        if self.module is not None:
            return getattr(self.module, name, default)
        if len(self.node.args) > place:
            return self.node.args[place]
        return self.node.kwargs.get(name, default)

    def fixed(self, name: str, place: int, default: Any = None) -> Any:
        """Return an option that must be known now, not only when the graph runs."""
        value = self.option(name, place, default)
        if any(
            isinstance(entry, Node) for entry in (value if isinstance(value, (tuple, list)) else (value,))
        ):
            raise ReplicationEnds(f"its {name} is known only when it runs")
        return value

    def from_end(self, axis: Any, source: Replication) -> int:
        """Return an axis counted from the end; one counted from the front asks for the number of axes."""
        if not isinstance(axis, int):
            raise ReplicationEnds("its axes are known only when it runs")
        return axis if axis < 0 else axis - self.rank(source)

    def rank(self, source: Replication) -> int:
        """Return the number of axes of a batch, and ask for it to be made sure of."""
        if source.rank is None:
            raise ReplicationEnds("it counts axes from the front, and how many there are is open")
        if not source.rank_is_sure:
            self.needs_rank = source.rank
        return source.rank

    def constant(self, node: Node) -> torch.Tensor | None:
        """Return the parameter or buffer that a node reads, None if it is something else."""
        value: Any = self.graph_module
        for part in str(node.target).split(".") if node.op == "get_attr" else ():
            value = getattr(value, part, None)
        return value if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class Flow:
    """How far compact values reach in a graph."""

    outcomes: Mapping[Node, Outcome]
    """Of the nodes that take compact inputs, and of those where a replication begins."""
    ends: Mapping[Node, str]
    """Why the others, which have such inputs too, need them spread."""


Rule: TypeAlias = Callable[[Call], Outcome]


def follow(
    graph_module: GraphModule,
    starts: Mapping[Node, Replication],
    rule_for: Callable[[Node], tuple[str, Rule | None]],
) -> Flow:
    """Follow replications from where they begin to where they end, in one walk over the graph.

    Args:
        graph_module: a lintable graph.
        starts: nodes that make a replication, and which.
        rule_for: returns what an operation is called, and its rule if it has one.
    """
    outcomes: dict[Node, Outcome] = {}
    ends: dict[Node, str] = {}
    carried: dict[Node, Replication] = {}
    written = written_besides(graph_module)
    for node in graph_module.graph.nodes:
        inputs = {source: carried[source] for source in node.all_input_nodes if source in carried}
        if inputs:
            outcome = _judged(node, inputs, graph_module, rule_for, written)
            if isinstance(outcome, str):
                ends[node] = outcome
            else:
                outcomes[node] = outcome
                if outcome.replication is not None:
                    carried[node] = outcome.replication
        if node in starts and node not in written and node not in ends:
            carried[node] = starts[node]
            outcomes.setdefault(node, Outcome(starts[node]))
    return Flow(outcomes, ends)


def _judged(
    node: Node,
    inputs: Mapping[Node, Replication],
    graph_module: GraphModule,
    rule_for: Callable[[Node], tuple[str, Rule | None]],
    written: set[Node],
) -> Outcome | str:
    if node in written:
        return "its value is changed in place while others read it"
    if node.op == "output":
        return "the model returns it"
    if node.target is region_output:
        return f"what follows is not known: Python calls {node.args[0]!r}"
    name, rule = rule_for(node)
    if rule is None:
        return f"{name} may mix channels, or is not known to keep them apart"
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is not None and hooks_of(module):
        return f"it has {' and '.join(hooks_of(module))}, which would see the folded channels"
    call = Call(node, name, module, inputs, graph_module)
    try:
        outcome = rule(call)
    except ReplicationEnds as end:
        return str(end)
    made = outcome.replication
    if call.needs_rank is not None and made is not None:
        made = dataclasses.replace(made, rank_is_sure=True)
    return dataclasses.replace(outcome, replication=made, needs_rank=call.needs_rank)


_MAY_SHARE_MEMORY = frozenset(
    {
        *("identity", "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "detach"),
        *(
            "flatten",
            "view",
            "reshape",
            "view_as",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "transpose",
            "permute",
        ),
        *("movedim", "getitem", "narrow", "select", "chunk", "split", "unbind", "expand", "expand_as"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout", "observe_activity", "getattr"),
    }
)


def written_besides(graph_module: GraphModule) -> set[Node]:
    """Return the nodes whose value something changes in place while something else reads it too."""
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
