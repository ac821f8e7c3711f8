"""The pages of what a program may import, from docstrings: the package, and each package in it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import biofx
from biofx import errors, integrations
from biofx.options import declared_options
from docs.reference.markup import directive, section, table

_PACKAGES = sorted(
    f"biofx.{name.partition('.')[0]}" for name in dir(biofx) if inspect.ismodule(getattr(biofx, name))
)
_LANGUAGES = ("biofx.rewriting.pass_text", "biofx.diagnostics.monitor_sinks", "biofx.rewriting.reproducer")
"""Modules whose docstrings define what users write or read, though their names are not for import."""
_INTRODUCTION = """
What a program may rely on: the names here, and no others. A name that is in several modules is described
in the first.
""".strip()


def public_names() -> dict[str, str]:
    """Return a page for each module, by its name; a name that is in several is described in the first.

    Errors have a page of their own.
    """
    described = {id(getattr(errors, name)): f"biofx.errors.{name}" for name in errors.__all__}
    pages = {name: _page(importlib.import_module(name), described) for name in ("biofx", *_PACKAGES)}
    pages["biofx.integrations"] = _integrations()
    pages.update({name: directive("automodule", name, no_members="") for name in _LANGUAGES})
    return pages


def overview(modules: Iterable[str]) -> str:
    """Return the page that leads to those of the modules."""
    rows = [[f":doc:`{name}`", _first_line(importlib.import_module(name))] for name in modules]
    tree = directive("toctree", "", "\n".join(modules), hidden="")
    return f"{_INTRODUCTION}\n\n{table(['module', 'what is in it'], rows, '35 65')}\n{tree}"


def _page(module: ModuleType, described: dict[int, str]) -> str:
    rows, parts = [], []
    for name in module.__all__:
        found, place = getattr(module, name), f"{module.__name__}.{name}"
        if inspect.ismodule(found):
            continue
        is_new = id(found) not in described
        known = described.setdefault(id(found), place)
        rows.append([f":py:obj:`~{known}`", _first_line(found)])
        if is_new:
            parts.append(section(name, _described(found, place)))
    overview = table(["name", "what it is"], rows, "30 70") if rows else ""
    return "\n\n".join([directive("automodule", module.__name__, no_members=""), overview, *parts])


def _integrations() -> str:
    """Return the page of what the package of integrations names, which lies in a module for each trainer."""
    named = re.findall(r":(class|func):`(biofx\.integrations\.[\w.]+)`", inspect.getdoc(integrations) or "")
    parts = []
    for role, place in named:
        kind = {"class": "autoclass", "func": "autofunction"}[role]
        parts.append(section(place.split(".")[2], directive(kind, place)))
    return "\n\n".join([directive("automodule", integrations.__name__, no_members=""), *parts])


def _first_line(found: Any) -> str:
    return (inspect.getdoc(found) or "").partition("\n\n")[0].replace("\n", " ")


def _described(found: Any, place: str) -> str:
    if not inspect.isclass(found):
        return directive("autofunction" if callable(found) else "autodata", place)
    hidden = [*declared_options(found)] if hasattr(found, "__dataclass_fields__") else []
    options = {"members": "", "show_inheritance": "", "member_order": "bysource"}
    if hidden:  # which have a page of their own
        options["exclude_members"] = ", ".join(hidden)
    return directive("autoclass", place, **options)
