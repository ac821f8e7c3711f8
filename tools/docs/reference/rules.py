"""The page of the rules: what each does, and its fields in a config."""

from __future__ import annotations

from biofx.config import config_options
from biofx.plasticity import BioModule
from docs.reference.markup import directive, section, table

_INTRODUCTION = """
Rules change weights or learning-rate factors while a model is trained. :func:`biofx.attach` runs them
from the optimizer's own steps: ``biofx.attach(bio_model, optimizer, [biofx.Rule("crystallize",
every=10)])``, see :class:`biofx.Rule`. Without it a loop calls them itself: ``bio_model.crystallize()``
runs one on every layer of a model of :class:`biofx.BioConverter`,
``bio_model.fc1.bio_mod.crystallize()`` on one layer. Each returns how many synapses it touched.
""".strip()


def rules_that_read(field: str) -> list[str]:
    """Return the rules that a field of a config acts on."""
    return list(getattr(config_options()[field], "rules", {}))


def rules() -> str:
    """Return the page."""
    return f"{_INTRODUCTION}\n\n" + "".join(map(_one_rule, BioModule.exposed_functions))


def _one_rule(name: str) -> str:
    rows = [
        [f":py:attr:`~biofx.BioConfig.{field}`", option.doc]
        for field, option in config_options().items()
        if name in rules_that_read(field)
    ]
    fields = table(["field of the config", "meaning"], rows, "35 65") if rows else ""
    body = directive("automethod", f"biofx.BioModule.{name}", no_index="")
    return f".. _rule-{name}:\n\n" + section(name, body, fields)
