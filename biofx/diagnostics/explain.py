"""What a selector means for a model: what it picks, what it nearly picks, and which options hold there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.fx import Node

from biofx.capture.capture import capture
from biofx.capture.example_inputs import ExampleInputs
from biofx.config import BioConfig
from biofx.graph.printing import format_node
from biofx.model.graph_module import BioGraphModule
from biofx.model.region_parts import joined
from biofx.rewriting.compile_config import compile_config
from biofx.rewriting.pass_text import format_value
from biofx.rewriting.remarks import Remark
from biofx.select import NodeIndex, Override, Selector, picks


def explain(
    model: nn.Module,
    selector: Selector,
    config: BioConfig | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
) -> RenderableType:
    """Return what a selector picks in a model and what the config does there, for ``rich.print``.

    Args:
        model: any module that can be captured; it is not changed.
        selector: see :mod:`biofx.select`.
        config: its overrides and passes are looked at; the default config if None.
        example_inputs: of one call; optional, see :func:`biofx.capture`.

    Raises:
        InputError: ``model`` cannot be taken.
        CaptureError: ``model`` cannot be captured.
        SelectorError: the selector, or one of an override, picks nothing; the nearest names are given.
    """
    config = config if config is not None else BioConfig()
    captured = capture(model, example_inputs=example_inputs)
    with joined(captured):
        return Group(*_explained(captured, selector, config))


def _explained(captured: BioGraphModule, selector: Selector, config: BioConfig) -> list[RenderableType]:
    index = NodeIndex(captured)
    matches = index.matches(selector)
    nodes = [c.node for c in index.candidates if any(c.node in match.nodes for match in matches)]
    paths = {path for match in matches for path in match.paths if path}
    called = {path for candidate in index.candidates for path, _ in candidate.calls}
    remarks = _remarks(captured, config)
    parts: list[RenderableType] = [Text(f"{format_value(selector)} picks {len(nodes)} nodes", style="bold")]
    parts.append(_nodes(nodes, remarks))
    parts += [
        Text(f"{path} is never called in the forward", style="yellow") for path in sorted(paths - called)
    ]
    picked = {node.name for node in nodes} | paths
    near = [name for name in index.near(selector) if name not in picked]
    if near:
        parts.append(Text(f"nearly picked: {', '.join(near)}", style="dim"))
    parts += _overrides(index, config, nodes)
    return parts


def _remarks(captured: BioGraphModule, config: BioConfig) -> dict[str, list[tuple[str, Remark]]]:
    """Return what each pass of the config says of each node."""
    said: dict[str, list[tuple[str, Remark]]] = {}
    for entry in compile_config(config)(captured).report.passes:
        for remark in entry.remarks:
            if remark.node is not None:
                said.setdefault(remark.node, []).append((entry.name, remark))
    return said


def _nodes(nodes: list[Node], remarks: dict[str, list[tuple[str, Remark]]]) -> Table:
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(overflow="fold")
    for node in nodes:
        line = Text(format_node(node))
        for name, remark in remarks.get(node.name, []):
            line.append(
                f"\n  {name} {remark.kind}: {remark.message}", "green" if remark.kind == "applied" else "dim"
            )
        table.add_row(line)
    return table


def _overrides(index: NodeIndex, config: BioConfig, nodes: list[Node]) -> Iterator[RenderableType]:
    """Say which override wins, for each group of nodes that the same overrides reach."""
    reaching: dict[tuple[int, ...], list[Node]] = {}
    found = [index.matches(override.selector) for override in config.overrides]
    for node in nodes:
        active = tuple(
            n for n, matches in enumerate(found) if any(picks(match, node, "") for match in matches)
        )
        if active:
            reaching.setdefault(active, []).append(node)
    for active, group in reaching.items():
        yield Text(f"overrides at {', '.join(node.name for node in group)}:", style="bold")
        yield _winners([config.overrides[number] for number in active])


def _winners(overrides: list[Override]) -> Table:
    table = Table(box=None, padding=(0, 1), show_header=False)
    values: dict[str, list[tuple[Override, Any]]] = {}
    for override in overrides:
        for name, value in override.options:
            values.setdefault(name, []).append((override, value))
    for name, given in values.items():
        *beaten, (winner, value) = given
        text = Text(f"  {name} = {format_value(value)}  from {format_value(winner.selector)}")
        for override, old in beaten:
            text.append(f"  (over {format_value(old)} from {format_value(override.selector)})", "dim")
        table.add_row(text)
    return table
