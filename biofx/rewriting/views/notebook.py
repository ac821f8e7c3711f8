"""A report in a notebook: folded tables without scripts, which viewers strip, and of bounded size."""

from __future__ import annotations

from itertools import islice

from biofx.html_tables import folded, paragraph, table
from biofx.rewriting.folded_remarks import fold_remarks
from biofx.rewriting.remarks import PassReport, ReportRecord
from biofx.rewriting.views.pictures import LARGEST_SHOWN, report_svg, shortened

_ROWS = 60
"""Lines of a pass, or of what was asked for, that are shown at most."""
_LONGEST = 300
"""Characters of a message."""
_MOST_BYTES = 150_000


def report_page(report: ReportRecord) -> str:
    """Return a report as HTML for a notebook."""
    parts = [paragraph(f"{report.model}: {report.summary()}")]
    told = [*report.unmet_lines(), *report.kept_lines()]
    parts += [paragraph(shortened(line, _LONGEST)) for line in islice(told, _ROWS)]
    parts += [paragraph(f"and {len(told) - _ROWS} more lines")] if len(told) > _ROWS else []
    if report.coverage is not None and report.coverage.mechanisms:
        reach = [paragraph(shortened(str(each), 2 * _LONGEST)) for each in report.coverage.mechanisms]
        parts.append(folded("how far mechanisms reached", "".join(reach)))
    size = sum(map(len, parts))
    for entry in report.passes:
        text = _pass_part(entry)
        size += len(text)
        line = f"{shortened(entry.text, _LONGEST)}: {entry.applied} applied, {entry.missed} left alone"
        parts.append(text if size < _MOST_BYTES else paragraph(line))
    if report.after is not None and len(report.after.nodes) <= LARGEST_SHOWN:
        parts.append(folded("graph", report_svg(report)))
    parts.append(paragraph('report.to_html("report.html") writes a page with both graphs and every remark'))
    return "".join(parts)


def _pass_part(entry: PassReport) -> str:
    remarks = list(fold_remarks(entry.remarks))
    rows: list[tuple[str, str, str]] = [
        (
            each.kind,
            shortened(each.subject, _LONGEST),
            shortened(each.message, _LONGEST),
        )
        for each in remarks[:_ROWS]
    ]
    if len(remarks) > _ROWS:
        rows.append(("", f"{len(remarks) - _ROWS} more lines", "print(report) shows all"))
    line = f"{shortened(entry.text, _LONGEST)}: {entry.applied} applied, {entry.missed} left alone"
    return folded(line, table(["", "layer", "what happened"], rows))
