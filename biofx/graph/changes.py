"""What differs between two graphs, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Graph, Node

from biofx.graph.printing import format_node


@dataclass(frozen=True)
class Change:
    """One node that differs between two graphs."""

    kind: Literal["created", "erased", "rewired", "replaced"]
    node: str
    before: str | None
    after: str | None
    because: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """A graph as it stood: each node's operation and its line of text."""

    operations: Mapping[str, tuple[str, str]]
    lines: Mapping[str, str]

    @classmethod
    def of(cls, graph: Graph) -> Snapshot:
        """Take down every node of a graph."""
        operations = {node.name: (node.op, _identity(node)) for node in graph.nodes}
        return cls(operations, {node.name: format_node(node) for node in graph.nodes})

    @property
    def text(self) -> str:
        """The graph as :func:`biofx.format_graph` prints it."""
        return "\n".join(self.lines.values())


def compare(before: Snapshot, after: Snapshot) -> list[Change]:
    """Return every node that differs, those of ``after`` in graph order and then the erased ones."""
    changes = []
    for name, line in after.lines.items():
        if name not in before.lines:
            changes.append(Change("created", name, None, line))
        elif before.operations[name] != after.operations[name]:
            changes.append(Change("replaced", name, before.lines[name], line))
        elif before.lines[name] != line:
            changes.append(Change("rewired", name, before.lines[name], line))
    gone = [name for name in before.lines if name not in after.lines]
    return changes + [Change("erased", name, before.lines[name], None) for name in gone]


def _identity(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"
