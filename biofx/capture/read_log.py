"""What the forward of one graph has read from attributes, and which of it has decided something."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from torch import nn
from torch.fx import Graph, Node

from biofx.capture.attribute_reads import Place
from biofx.capture.mode_switches import ModeSwitches
from biofx.capture.tracked import Source, Writer, tracked
from biofx.capture.values import TORCH_FOLDER
from biofx.model.attribute_guards import Needed, put_guards


@dataclass(frozen=True)
class Read:
    """One attribute that a forward has read."""

    path: str
    """Of the module, in the module that the graph is of."""
    names: tuple[str, ...]
    where: str
    """File and line."""
    decides: bool
    """Whether what was read may have decided something; else it only went into arithmetic."""

    @property
    def target(self) -> str:
        """Where a node would read it."""
        return ".".join((self.path, *self.names) if self.path else self.names)


class AttributeWriter(Writer, Protocol):
    """Who writes a graph that reads attributes."""

    def attribute_node(self, target: str) -> Node:
        """Return the node that reads an attribute."""


class ReadLog:
    """Keeps what one forward reads, in the order in which it does."""

    def __init__(self, writer: AttributeWriter) -> None:
        self.reads: list[Read] = []
        self._writer = writer

    def take(self, path: str, names: tuple[str, ...], value: Any, place: Place) -> Any:
        """Note a read; return a number that remembers its node, anything else as it is."""
        is_number = type(value) is float or (type(value) is int and place.is_operand)
        flows = is_number and place.can_be_followed and all(name.isidentifier() for name in names)
        where = place.where
        read = Read(path, names, where, not flows)
        self.reads.append(read)
        if not flows:
            return value
        writer = self._writer
        return tracked(value, writer, lambda: writer.attribute_node(read.target), frozenset({(path, names)}))

    def decided_by(self, sources: Iterable[Source]) -> None:
        """Note that numbers have decided something."""
        where = _line_of(sys._getframe(1))
        self.reads += [Read(path, names, where, True) for path, names in sorted(sources)]

    def forget(self, count: int) -> None:
        """Keep the first reads only."""
        del self.reads[count:]


def _line_of(frame: FrameType | None) -> str:
    """Return the file and line of the innermost code that is neither ours nor torch's."""
    while frame is not None and (
        frame.f_code.co_filename.startswith(TORCH_FOLDER)
        or str(frame.f_globals.get("__name__")).startswith("biofx.capture.")
    ):
        frame = frame.f_back
    return "its forward" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def guard_reads(
    graph_module: nn.Module, graph: Graph, reads: Iterable[Read], switches: ModeSwitches, prefix: str = ""
) -> None:
    """Let a graph module make sure of what its graph takes for granted.

    Args:
        graph_module: what was made of the module.
        graph: its graph; what a node of it reads is read anew.
        reads: what the forward read while the graph was captured.
        switches: what train() and eval() change.
        prefix: path of the module in the whole model.
    """
    nodes = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    decides: dict[tuple[str, tuple[str, ...]], str] = {}
    flows: dict[tuple[str, tuple[str, ...]], str] = {}
    for read in reads:
        kind = decides if read.decides or read.target not in nodes else flows
        kind.setdefault((read.path, read.names), read.where)
    put_guards(
        graph_module,
        [
            Needed(path, names, where, is_read, switches.pair(prefix, path, names))
            for kind, is_read in ((decides, False), (flows, True))
            for (path, names), where in kind.items()
            if not (is_read and (path, names) in decides)
        ],
        prefix,
    )
