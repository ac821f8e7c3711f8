"""The page of the passes: the story of each with its source and deviations, and its options."""

from __future__ import annotations

import dataclasses
import inspect
import sys

from biofx.options import declared_options
from biofx.rewriting.catalogue import field_docs
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.pass_text import format_value
from biofx.rewriting.registry import available_passes
from docs.reference.markup import directive, facts, section

_SHARED = dataclasses.fields(Pass)
_INTRODUCTION = """
They run in this order, where a config asks for them. In a text, ``biofx.transform(model, passes="…")``,
a pass is written by name with its options in braces: ``split-weights{gamma=2},constrain-signs``.
""".strip()


def passes() -> str:
    """Return the page."""
    shared = section(
        "Options of every pass",
        *(_option("biofx.Pass", field, field_docs(Pass)[field.name], "", "") for field in _SHARED),
    )
    return f"{_INTRODUCTION}\n\n" + "".join(map(_one_pass, available_passes().values())) + shared


def _one_pass(cls: type[Pass]) -> str:
    story = inspect.getdoc(sys.modules[cls.__module__]) or inspect.getdoc(cls) or ""
    order = [f":ref:`{name} <pass-{name}>`" for name in cls.after]
    written = {**field_docs(cls), **{name: found.doc for name, found in declared_options(cls).items()}}
    shared = {field.name for field in _SHARED}
    public = f"biofx.passes.{cls.__name__}"
    options = []
    for field in dataclasses.fields(cls):
        if field.name not in shared:
            declared = declared_options(cls).get(field.name)
            config = f":py:attr:`~biofx.BioConfig.{declared.field}`" if declared and declared.field else ""
            permitted = str(declared.permitted) if declared else ""
            options.append(_option(public, field, written.get(field.name, ""), permitted, config))
    said = facts([("In Python", f":class:`{public}`"), ("Runs after", ", ".join(order))])
    return f".. _pass-{cls.name}:\n\n" + section(cls.name, story, said, *options)


def _option(owner: str, field: dataclasses.Field[object], doc: str, permitted: str, config: str) -> str:
    default = "" if field.default is dataclasses.MISSING else format_value(field.default)
    said = facts([("Expected", permitted), ("In a config", config)])
    given = {"value": default} if default else {}
    if owner == "biofx.Pass":  # which the public names have too
        given["no_index"] = ""
    return directive("py:attribute", f"{owner}.{field.name}", doc, said, **given)
