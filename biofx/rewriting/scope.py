"""What one run of a pass may touch, with which options, and for which candidate each node was changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar

from torch.fx import Graph, GraphModule, Node

from biofx.errors import PassError
from biofx.graph.changes import Change
from biofx.rewriting.remarks import Remark
from biofx.select import Match, NodeIndex, Override, Selection, Selector, picks, show_pattern
from biofx.torch_private import node_table, replacement_hooks

Selections = tuple[tuple[Selector | None, Selector | None], ...]
"""``only`` and ``exclude`` of a pass and of the pipelines around it, outermost first."""


class Selectable(Protocol):
    """What a scope knows of a pass: a dataclass with these fields."""

    name: ClassVar[str]

    @property
    def enabled(self) -> bool:
        """Whether the pass acts at all."""

    @property
    def overrides(self) -> tuple[Override, ...]:
        """Other options for some layers."""


PassT = TypeVar("PassT", bound=Selectable)


class Scope:
    """What one run of a pass may touch, and with which options.

    Args:
        owner: the pass.
        graph_module: the graph before the pass.
        within: the selections of the pass and of the pipelines around it.

    Raises:
        SelectorError: a pattern matches nothing.
    """

    def __init__(self, owner: Selectable, graph_module: GraphModule, within: Selections) -> None:
        index = NodeIndex(graph_module)
        self._selections = [Selection.of(index, only, exclude) for only, exclude in within]
        self.overrides = [(index.matches(entry.selector), dict(entry.options)) for entry in owner.overrides]
        """What each override of the pass picks, and its options."""
        self._owner = owner
        self._variants: dict[tuple[int, ...], Any] = {}
        self.changes = ChangeRecorder(graph_module.graph)
        """For which candidate each node was changed."""

    @contextmanager
    def rewriting(self, node: Node) -> Iterator[None]:
        """Let every node that is created, changed or erased inside this context belong to a candidate.

        :meth:`~biofx.Pass.rewrite` does this around :meth:`~biofx.Pass.rewrite_node`; only a pass with a
        ``rewrite`` of its own needs it, and only where it changes the graph at another time than right before
        it yields the candidate's remark. What a selector says of the candidate holds for the nodes that are
        created too.
        """
        with self.changes.belongs_to(node):
            yield

    def options(self, owner: PassT, node: Node | None, layer: str) -> PassT | str:
        """Return the pass with the options that hold for a candidate, or the reason why it is left alone.

        Args:
            owner: the pass that asks.
            node: the candidate; None for a layer that is never called.
            layer: path of its layer.
        """
        return self.why_not(node, layer) or self.variant(owner, node, layer)

    def why_not(self, node: Node | None, layer: str) -> str | None:
        """Return why a candidate is not selected or switched off, None where the pass may rewrite it."""
        node = self.changes.created_for(node)
        for selection in self._selections:
            reason = selection.why_not(node, layer)
            if reason is not None:
                return reason
        return None if self.variant(self._owner, node, layer).enabled else "switched off here (enabled=False)"

    def variant(self, owner: PassT, node: Node | None, layer: str) -> PassT:
        """Return the pass with the options that hold for a place, whether the pass may rewrite it or not."""
        node = self.changes.created_for(node)
        active = tuple(
            number
            for number, (matches, _) in enumerate(self.overrides)
            if any(picks(match, node, layer) for match in matches)
        )
        if active not in self._variants:
            options: dict[str, Any] = {}
            for number in active:
                options.update(self.overrides[number][1])
            self._variants[active] = dataclasses.replace(self._owner, overrides=(), **options)  # type: ignore[type-var]
        chosen = self._variants[active]
        if not isinstance(chosen, type(owner)):
            raise PassError(f"the scope of {self._owner.name} was asked for the options of {owner.name}")
        return chosen

    def idle_selections(self, remarks: Sequence[Remark]) -> list[Remark]:
        """Return a remark for each pattern that picks something, but no candidate of the pass."""
        nodes = {remark.node for remark in remarks}
        layers = {remark.layer for remark in remarks}
        wanted = [("only", match) for selection in self._selections for match in selection.only or ()]
        wanted += [("override", match) for matches, _ in self.overrides for match in matches]
        return [
            self._idle(side, match)
            for side, match in wanted
            if not {node.name for node in match.nodes} & nodes and not match.paths & layers
        ]

    def _idle(self, side: str, match: Match) -> Remark:
        first = min(match.nodes).name if match.nodes else None
        what = f"{len(match.nodes)} nodes" if match.nodes else f"{len(match.paths)} modules, never called"
        message = (
            f"{side}={show_pattern(match.pattern)} picks {what}, none of which {self._owner.name} acts on"
        )
        return Remark("missed", first, min(match.paths, default=""), message, {"picked": len(match.nodes)})


class ChangeRecorder:
    """Records for which candidate each node of a graph was first created, changed or erased.

    ``torch.fx`` takes a node out of its table of nodes and puts it back whenever an attribute of the node is
    set, and calls the module's replace hooks where an input is replaced. Both are watched here, so that no
    change is missed, and the cost of one does not depend on the size of the graph.

    Args:
        graph: the graph before it is changed.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._before = {node.name: node for node in graph.nodes}
        self._candidate: Node | None = None
        self._created_for: dict[Node, Node] = {}
        self._owners: dict[Node, str] = {}
        self._not_owned: dict[Node, None] = {}
        self._released: dict[Node, None] = {}
        self._orphaned_by: dict[Node, str] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the changes that are made inside this context."""
        table = node_table(self._graph)
        hooks = replacement_hooks(self._graph.owning_module)
        insert, remove = table.insert, table.remove

        def inserted(node: Node) -> None:
            insert(node)
            self._changed(node)

        def removed(node: Node) -> None:
            self._released.update(dict.fromkeys(node.all_input_nodes))
            remove(node)
            self._changed(node)

        def replaced(old: Node, new: str, user: Node) -> None:
            self._released[old] = None
            self._changed(user)

        table.insert, table.remove = inserted, removed
        hooks.append(replaced)
        try:
            yield
        finally:
            del table.insert, table.remove
            hooks.remove(replaced)

    def _changed(self, node: Node) -> None:
        if self._candidate is None:
            self._not_owned[node] = None
            return
        if node not in self._owners and node.name not in self._before:
            self._created_for[node] = self._candidate
        self._owners.setdefault(node, self._candidate.name)

    @contextmanager
    def belongs_to(self, candidate: Node | None) -> Iterator[None]:
        """Let the changes inside this context belong to a candidate; None changes nothing about it."""
        outer, self._candidate = self._candidate, candidate or self._candidate
        try:
            yield
        finally:
            if candidate is not None:
                self._orphan(candidate.name)
            self._candidate = outer

    def claim(self, candidate: str | None) -> None:
        """Let the changes so far that belong to no candidate belong to the one of that name."""
        if candidate is None:
            return
        for node in self._not_owned:
            self._owners.setdefault(node, candidate)
        self._not_owned.clear()
        self._orphan(candidate)

    def _orphan(self, candidate: str) -> None:
        """Remember who took the last user from the nodes that have none now."""
        for node in self._released:
            if not node.users:
                self._orphaned_by.setdefault(node, candidate)
        self._released.clear()

    def erase_orphan(self, node: Node) -> None:
        """Erase a node that has lost its users, for the candidate that took the last of them."""
        owner = self._orphaned_by.get(node) or self._owners.get(node)
        self._graph.erase_node(node)
        self.claim(owner)

    def created_for(self, node: Node | None) -> Node | None:
        """Return the candidate for which a node was created, the node itself if it was there before."""
        return None if node is None else self._created_for.get(node, node)

    def with_causes(self, changes: Iterable[Change], remarks: Iterable[Remark]) -> tuple[Change, ...]:
        """Return the changes, each with the candidate whose rewrite made it.

        A candidate that was rewritten is its own cause. What was changed for a node that is no candidate, as
        a layer whose parameters are, belongs to the first candidate that was created for it.
        """
        rewritten = {r.node: r.node for r in remarks if r.kind == "applied" and r.node is not None}
        nodes = self._before | {node.name: node for node in self._graph.nodes}
        representative: dict[str, str] = {}
        for name in rewritten:
            if name in nodes:
                representative.setdefault(self._owners.get(nodes[name], name), name)
        representative |= rewritten

        def cause(name: str) -> str | None:
            return rewritten.get(name) or representative.get(self._owners.get(nodes[name], ""))

        return tuple(dataclasses.replace(change, cause=cause(change.node)) for change in changes)
