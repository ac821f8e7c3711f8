"""Tables for notebooks: plain HTML without scripts, in which every text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table.

    >>> table(["field"], [["a<b"]])
    '<table><tr><th>field</th></tr><tr><td>a&lt;b</td></tr></table>'
    """
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def paragraph(text: str) -> str:
    """Return a paragraph of text."""
    return f"<p>{html.escape(text)}</p>"


def folded(summary: str, content: str, *, is_open: bool = False) -> str:
    """Return content that a click unfolds, below a line of text.

    Args:
        summary: the line.
        content: HTML.
        is_open: whether it is unfolded at first.
    """
    opening = "<details open>" if is_open else "<details>"
    return f"{opening}<summary>{html.escape(summary)}</summary>{content}</details>"
