"""What differs between two graphs, node by node and line by line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch.fx import Graph, GraphModule, Node

from biofx.graph.analysis_cache import cached_on_graph
from biofx.graph.printing import format_graph, format_node

if TYPE_CHECKING:  # which takes long to import
    from rich.console import Console
    from rich.text import Text


@dataclass(frozen=True)
class Change:
    """One node that differs between two graphs."""

    kind: Literal["created", "erased", "rewired", "replaced"]
    node: str
    before: str | None
    after: str | None
    cause: str | None = None
    """Name of the candidate whose rewrite changed the node."""


@dataclass(frozen=True)
class Snapshot:
    """A graph at one time: the operation of each node and its line of text."""

    operations: Mapping[str, tuple[str, str]]
    lines: Mapping[str, str]

    @property
    def text(self) -> str:
        """The graph as :func:`biofx.format_graph` prints it."""
        return "\n".join(self.lines.values())


@cached_on_graph
def snapshot_of(graph_module: GraphModule) -> Snapshot:
    """Return the snapshot of a graph module's graph, made once for each state of the graph."""
    nodes = graph_module.graph.nodes
    operations = {node.name: (node.op, _identity(node)) for node in nodes}
    return Snapshot(operations, {node.name: format_node(node) for node in nodes})


def compare(before: Snapshot, after: Snapshot) -> list[Change]:
    """Return every node that differs: those of ``after`` in graph order, then the erased ones."""
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


def diff_graphs(
    before: GraphModule | Graph | str, after: GraphModule | Graph | str, *, context: int = 1
) -> str:
    """Return what differs between two graphs, line by line, with runs of unchanged lines folded.

    Args:
        before: a graph, or its text.
        after: a graph, or its text.
        context: unchanged lines shown on each side of a change, a count.

    Returns:
        Lines that start with ``-`` (gone), ``+`` (new) or a space; empty if nothing differs.
    """
    old = (before if isinstance(before, str) else format_graph(before)).splitlines()
    new = (after if isinstance(after, str) else format_graph(after)).splitlines()
    lines: list[str] = []
    changed = False
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    for place, (kind, a, b, c, d) in enumerate(blocks):
        if kind == "equal":
            lines += _fold(old[a:b], 0 if place == 0 else context, 0 if place == len(blocks) - 1 else context)
        else:
            changed = True
            lines += [f"- {line}" for line in old[a:b]] + [f"+ {line}" for line in new[c:d]]
    return "\n".join(lines) if changed else ""


def render_diff(diff: str) -> Text:
    """Return a diff for ``rich.print``, with additions in green and removals in red."""
    from rich.text import Text

    styles = {"+": "green", "-": "red", "…": "dim"}
    lines = diff.splitlines() or ["(the graph is unchanged)"]
    return Text("\n").join(Text(line, style=styles.get(line.strip()[:1], "")) for line in lines)


def print_changed(name: str, before: str, after: str, *, console: Console | None = None) -> None:
    """Print the diff of one pass; an observer for ``Pipeline(..., observe=biofx.graph.print_changed)``."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.rule(Text(f"after {name}"))
    console.print(render_diff(diff_graphs(before, after)), soft_wrap=True)


def _fold(lines: list[str], head: int, tail: int) -> Iterable[str]:
    """Show ``head`` lines after the last change and ``tail`` before the next; fold the lines between."""
    hidden = len(lines) - head - tail
    if hidden <= 1:
        return [f"  {line}" for line in lines]
    kept_head, kept_tail = lines[:head], lines[len(lines) - tail :] if tail else []
    return [*(f"  {x}" for x in kept_head), f"  … {hidden} unchanged lines", *(f"  {x}" for x in kept_tail)]
