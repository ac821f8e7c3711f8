"""A report in the terminal: a table for each pass, or the tree of the model's modules with remarks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from biofx.graph.changes import Change
from biofx.graph.graph_view import GraphView
from biofx.rewriting.remarks import PassReport, Remark, ReportRecord

STYLES = ("blue", "yellow", "green", "magenta", "cyan", "red", "bright_blue", "bright_magenta")
"""Styles of the passes, in the order they ran, again from the start when there are more."""

_FEWEST_ALIKE = 4  # fewer take little room, and their own numbers say more than a range
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:–\d+(?:\.\d+)?)?")  # or a range of them


def report_table(report: ReportRecord) -> Group:
    """Return the summary, what stays in Python, how far mechanisms reached, and a table for each pass."""
    parts: list[RenderableType] = [Text(f"{report.model}: {report.summary()}", style="bold")]
    parts += [Text(line, style="bold red") for line in report.unmet_lines()]
    parts += [Text(line, style="yellow") for line in report.kept_lines()]
    parts += [Text(str(reach)) for reach in (report.coverage.mechanisms if report.coverage else ())]
    return Group(*parts, *(_pass_table(entry) for entry in report.passes))


def _pass_table(entry: PassReport) -> Table:
    title = Text(
        f"{entry.text}  {entry.applied} applied, {entry.missed} left alone, {entry.seconds * 1e3:.1f} ms"
    )
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), expand=False
    )
    table.add_column("", width=1)
    table.add_column("node", overflow="fold")
    table.add_column("what happened", overflow="fold")
    by_candidate: dict[str | None, list[Change]] = {}
    for change in entry.changes:
        by_candidate.setdefault(change.cause, []).append(change)
    for remark in entry.remarks:
        done = remark.kind == "applied"
        message = Text(remark.message, style="" if done else "dim")
        if done:
            message.append_text(_changed_nodes(by_candidate.pop(remark.node, [])))
        table.add_row(
            Text("✓" if done else "·", style="green" if done else "dim"), Text(remark.subject), message
        )
    for changes in by_candidate.values():
        table.add_row("", "", _changed_nodes(changes))
    return table


def _changed_nodes(changes: list[Change]) -> Text:
    """List the nodes that differ, one line for each kind of difference."""
    kinds: dict[str, list[str]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(change.node)
    return Text("").join(
        Text(f"\n{kind}: {', '.join(names)}", style="green") for kind, names in kinds.items()
    )


@dataclass(frozen=True)
class ModelTree:
    """The modules of a report's model with the remarks on each; for ``rich.print``.

    Neighbours that differ only in numbers, like the blocks of a deep network, are shown as one, with the
    range of each number.
    """

    report: ReportRecord

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before, _ = self.report.graphs()
        plain = options.ascii_only
        root = _branches(self.report, before)
        title = Text(f"{self.report.model}: {self.report.summary()}", style="bold")
        tree = Tree(title, guide_style="dim")
        for line in root.lines(self.report, plain):
            tree.add(line)
        _grow(tree, root.children, self.report, plain)
        yield tree
        for kept in self.report.kept_lines():
            yield Text(kept, style="yellow")
        if self.report.passes:
            yield Text()
            yield _totals_table(self.report, before)


@dataclass
class _Branch:
    """A module with its remarks and what lies in it."""

    name: str
    kind: str
    remarks: list[tuple[int, Remark]] = field(default_factory=list)
    children: list[_Branch] = field(default_factory=list)

    def lines(self, report: ReportRecord, plain: bool) -> Iterator[Text]:
        """Yield a line for each remark on this module; equal remarks on several calls are one line."""
        said: dict[tuple[int, str, str], int] = {}
        for number, remark in self.remarks:
            key = (number, remark.kind, remark.message)
            said[key] = said.get(key, 0) + 1
        for (number, kind, message), count in said.items():
            if plain:
                message = message.replace("–", "-")
            done = kind == "applied"
            mark = ("+" if done else "-") if plain else ("✓" if done else "·")
            line = Text().append(f"{mark} ", STYLES[number % len(STYLES)] if done else "dim")
            line.append(report.passes[number].name, STYLES[number % len(STYLES)])
            line.append(f": {message}{f' ({count} times)' if count > 1 else ''}", "" if done else "dim")
            yield line

    def shape(self) -> tuple[object, ...]:
        """Return what must be equal for two modules to be shown as one: all but their names and numbers."""
        said = tuple(
            (number, remark.kind, _NUMBER.sub("#", remark.message)) for number, remark in self.remarks
        )
        return self.kind, said, tuple((child.name, child.shape()) for child in self.children)

    def has_remarks(self) -> bool:
        """Whether there is a remark on this module or on one in it."""
        return bool(self.remarks) or any(child.has_remarks() for child in self.children)


def _branches(report: ReportRecord, graph: GraphView) -> _Branch:
    branches: dict[str, _Branch] = {}
    for path, module in graph.modules.items():
        parent, _, name = path.rpartition(".")
        branches[path] = _Branch(name, module.kind)
        if path:
            branches[parent].children.append(branches[path])
    root = branches[""]
    for number, entry in enumerate(report.passes):
        for remark in entry.remarks:
            branches.get(remark.layer, root).remarks.append((number, remark))
    return root


def _shown_as_one(alike: Sequence[_Branch]) -> _Branch:
    """Return modules of one shape as a single one, with the range of each number that differs."""
    first = alike[0]
    remarks = [
        (
            number,
            dataclasses.replace(remark, message=_ranged([each.remarks[place][1].message for each in alike])),
        )
        for place, (number, remark) in enumerate(first.remarks)
    ]
    children = [_shown_as_one(children) for children in zip(*(each.children for each in alike), strict=True)]
    last = alike[-1].name
    if first.name == last:  # the same module in each of several that are shown as one
        return _Branch(first.name, first.kind, remarks, children)
    return _Branch(f"{first.name} to {last}", f"{first.kind}, {len(alike)} alike", remarks, children)


def _ranged(messages: Sequence[str]) -> str:
    """Return texts that differ in numbers as one.

    >>> _ranged(["4 units, mean 0.9", "4 units, mean 1.1", "4 units, mean 1.0"])
    '4 units, mean 0.9–1.1'
    """
    columns = zip(*(_NUMBER.findall(message) for message in messages), strict=True)
    ranges = map(_range, columns)
    return _NUMBER.sub(lambda _: next(ranges), messages[0])


def _range(found: Sequence[str]) -> str:
    ends = [end for number in found for end in number.split("–")]
    low, high = min(ends, key=float), max(ends, key=float)
    return low if low == high else f"{low}–{high}"


def _folded(branches: Sequence[_Branch]) -> Iterator[_Branch]:
    for _, group in groupby(branches, key=_Branch.shape):
        alike = list(group)
        if len(alike) < _FEWEST_ALIKE:
            yield from alike
        else:
            yield _shown_as_one(alike)


def _grow(tree: Tree, branches: Sequence[_Branch], report: ReportRecord, plain: bool) -> None:
    for branch in _folded(branches):
        label = Text(branch.name, style="bold" if branch.has_remarks() else "dim")
        grown = tree.add(label.append(f"  {branch.kind}", "dim"))
        for line in branch.lines(report, plain):
            grown.add(line)
        if branch.has_remarks():
            _grow(grown, branch.children, report, plain)


def _totals_table(report: ReportRecord, graph: GraphView) -> Table:
    """Return the totals of each pass: counts, share of the parameters, time."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("pass", overflow="fold")
    for heading in ("applied", "left alone", "parameters", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, entry in enumerate(report.passes):
        table.add_row(
            Text(entry.text, style=STYLES[number % len(STYLES)]),
            str(entry.applied),
            str(entry.missed),
            f"{entry.coverage(graph).fraction:.1%}",
            f"{entry.seconds * 1e3:.1f} ms",
        )
    return table
