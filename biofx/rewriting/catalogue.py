"""What passes there are and what their options mean, read from their docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from biofx.config import BioConfig, config_options
from biofx.options import Option, declared_options, given_at_rules
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.pass_text import format_value
from biofx.rewriting.registry import available_passes

_SHARED = frozenset(field.name for field in dataclasses.fields(Pass))


def describe_passes() -> RenderableType:
    """Return every known pass with its options, for ``rich.print``."""
    parts: list[RenderableType] = []
    for cls in available_passes().values():
        parts += [*_describe(cls), Text()]
    parts.append(Text("every pass", style="bold"))
    parts += [_options(field_docs(Pass), list(dataclasses.fields(Pass))), Text()]
    parts.append(Text("fields of a config that no pass reads: options of the plasticity rules", style="bold"))
    rules = {name: found for name, found in config_options().items() if not found.feeds}
    fields = [field for field in dataclasses.fields(BioConfig) if field.name in rules]
    parts.append(_options({name: _described(found) for name, found in rules.items()}, fields))
    return Group(*parts)


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring beneath each field of a dataclass, by the field's name.

    >>> field_docs(Pass)["exclude"]
    'Leave alone what this selects.'
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    docs = {}
    for entry, below in pairwise(body):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and is_text:
            docs[entry.target.id] = inspect.cleandoc(str(below.value.value))  # type: ignore[attr-defined]
    return docs


def _describe(cls: type[Pass]) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(cls.name, style="bold green")]
    story = inspect.getdoc(sys.modules[cls.__module__]) or inspect.getdoc(cls) or ""
    paragraphs = story.split("\n\n")
    parts += [Padding(prose(text), (0, 0, 0, 2)) for text in paragraphs[:2]]
    if cls.after:
        parts.append(Padding(Text(f"Runs after {', '.join(cls.after)}.", style="dim"), (0, 0, 0, 2)))
    own = [field for field in dataclasses.fields(cls) if field.name not in _SHARED]
    declared = {name: _described(found) for name, found in declared_options(cls).items()}
    return [*parts, _options({**field_docs(cls), **declared}, own)] if own else parts


def _described(option: Option) -> str:
    field = f" In a config: {option.field}." if option.field else ""
    return f"{option.doc} Expected: {option.permitted}.{field}{given_at_rules(option)}"


def _options(docs: dict[str, str], fields: list[dataclasses.Field[object]]) -> Table:
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for field in fields:
        default = "" if field.default is dataclasses.MISSING else format_value(field.default)
        table.add_row(Text(f" {field.name}={default}"), prose(docs.get(field.name, "")))
    return table


def prose(docstring: str) -> Text:
    """Return a docstring's paragraph without its markup."""
    return Text(re.sub(r"(?::\w+:)?`+([^`]*)`+", r"\1", " ".join(docstring.split())))
