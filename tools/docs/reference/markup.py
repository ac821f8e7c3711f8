"""Pieces of reStructuredText, in which docstrings are written too."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def section(title: str, *parts: str) -> str:
    """Return a section of a page."""
    return "\n\n".join([f"{title}\n{'-' * len(title)}", *filter(None, parts)]) + "\n\n"


def directive(name: str, argument: str = "", *body: str, **options: str) -> str:
    """Return a directive; options without a text are flags, and a name's ``_`` stands for ``-``."""
    head = [f".. {name}:: {argument}".rstrip()]
    head += [f"   :{option.replace('_', '-')}: {value}".rstrip() for option, value in options.items()]
    inside = [textwrap.indent(part, "   ") for part in body if part]
    return "\n\n".join(["\n".join(head), *inside]) + "\n"


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """Return a paragraph of names and what belongs to each; those without are left out."""
    return " ".join(f"*{name}:* {text.rstrip('.')}." for name, text in entries if text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], widths: str) -> str:
    """Return a table; a cell may have markup."""
    lines = []
    for row in [head, *rows]:
        lines += [f"{'* -' if place == 0 else '  -'} {cell}".rstrip() for place, cell in enumerate(row)]
    return directive("list-table", "", "\n".join(lines), header_rows="1", widths=widths)


def code(text: str) -> str:
    """Return a text as code; an empty one as nothing."""
    return f"``{text}``" if text else ""


def links(role: str, targets: Iterable[str]) -> str:
    """Return references, with commas."""
    return ", ".join(f":{role}:`{target}`" for target in targets)
