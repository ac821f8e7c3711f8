"""A report in the terminal: one table a pass."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from biofx.graph.changes import Change
from biofx.rewriting.remarks import PassReport, ReportRecord


def report_table(report: ReportRecord) -> Group:
    """Return the summary, what stays in Python, and a table for each pass."""
    parts: list[RenderableType] = [Text(f"{report.model}: {report.summary()}", style="bold")]
    parts += [Text(line, style="bold red") for line in report.unmet_lines()]
    parts += [Text(line, style="yellow") for line in report.kept_lines()]
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
    """Name the nodes that differ, one line for each kind of difference."""
    kinds: dict[str, list[str]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(change.node)
    return Text("").join(
        Text(f"\n{kind}: {', '.join(names)}", style="green") for kind, names in kinds.items()
    )
