"""The page of the rules: what each does, its fields in a config, and the formulas behind them."""

from __future__ import annotations

import importlib
import inspect
import re

from biofx.config import config_options
from biofx.options import AtRule
from biofx.plasticity import BioModule
from docs.reference.markup import code, directive, section, table

_INTRODUCTION = """
Rules change weights or learning-rate factors while a model is trained. :func:`biofx.attach` runs them from
the optimizer's own steps: ``biofx.attach(bio_model, optimizer, [biofx.Rule("crystallize", every=10)])``. An
entry of the schedule may give options of its own, ``biofx.Rule("crystallize", dampening=0.5)``; see
:class:`biofx.Rule`. Without it a loop calls them itself: ``bio_model.crystallize()`` runs one on every layer
of a model of :class:`biofx.BioConverter`, ``bio_model.fc1.bio_mod.crystallize()`` on one layer. Each returns
how many synapses it touched.
""".strip()
_MODULE = re.compile(r":mod:`(biofx\.[\w.]+)`")


def rules_that_read(field: str) -> list[str]:
    """Return the rules that a field of a config acts on."""
    return list(config_options()[field].rules)


def rules() -> str:
    """Return the page."""
    stories = [inspect.getdoc(getattr(BioModule, name)) or "" for name in BioModule.exposed_functions]
    modules = dict.fromkeys(module for story in stories for module in _MODULE.findall(story))
    parts = [*map(_one_rule, BioModule.exposed_functions), *map(_formulas, modules)]
    return f"{_INTRODUCTION}\n\n" + "".join(parts)


def _one_rule(name: str) -> str:
    rows = [
        [code(read.option), f":py:attr:`~biofx.BioConfig.{field}`", _given_where(read), option.doc]
        for field, option in config_options().items()
        for rule, read in option.rules.items()
        if rule == name
    ]
    head = ["option", "field of the config", "in a schedule", "meaning"]
    body = directive("automethod", f"biofx.BioModule.{name}", no_index="")
    return f".. _rule-{name}:\n\n" + section(name, body, table(head, rows, "15 25 20 40") if rows else "")


def _given_where(read: AtRule) -> str:
    """Return whether an entry of a schedule may give an option."""
    if read.shapes is not None:
        return "no, at the transform"
    return "yes, one for a weight" if read.lasts else "yes"


def _formulas(module: str) -> str:
    """Return what the docstring of a module says, in which a magnitude is written with bars."""
    story = inspect.getdoc(importlib.import_module(module)) or ""
    pieces = re.split("(``.*?``)", story)
    plain = "".join(piece if piece.startswith("``") else piece.replace("|", "\\|") for piece in pieces)
    return section(module, directive("py:module", module), plain)
