"""The page of a config's fields: what each means, may be and is by default, and what reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from biofx.config import BioConfig, config_options
from biofx.options import Option
from biofx.plasticity import BioModule
from biofx.rewriting.registry import available_passes
from biofx.toml import value_text
from docs.reference.markup import code, directive, facts, section, table
from docs.reference.rules import rules_that_read

_INTRODUCTION = """
The fields of :class:`biofx.BioConfig`. One is given by name,
``biofx.BioConfig(weight_splitting_Gamma=2)``, in a TOML file, ``biofx transform --config``, or on the
command line, ``--set weight_splitting_Gamma=2``; for some layers alone, by
:meth:`biofx.BioConfig.override`. What is out of its range is a :class:`biofx.OptionError`.
""".strip()
_WHOLE_MODEL = "Whole model"


def config_fields() -> str:
    """Return the page: an overview of each group of fields, and what can be said of each."""
    groups: dict[str, list[str]] = {_WHOLE_MODEL: []}
    groups |= {f"Pass {name}": [] for name in available_passes()}
    groups |= {f"Rule {name}": [] for name in BioModule.exposed_functions}
    for name, option in config_options().items():
        groups[_group(name, option)].append(name)
    parts = [_INTRODUCTION + "\n\n"]
    for title, names in groups.items():
        rows = [
            [f":py:attr:`~biofx.BioConfig.{name}`", code(default(name)), permitted(name)] for name in names
        ]
        if names:
            overview = table(["field", "default", "expected"], rows, "45 20 35")
            parts.append(section(title, overview, *map(_field, names)))
    return "".join(parts)


def default(name: str) -> str:
    """Return a field's default as a Python text."""
    (found,) = (field for field in dataclasses.fields(BioConfig) if field.name == name)
    return value_text(BioConfig().to_plain_text()[name]) if callable(found.default) else _shown(found.default)


def _shown(value: object) -> str:
    return repr(getattr(value, "value", value))


def _group(name: str, option: Option) -> str:
    """Return the first pass or rule that reads a field, which it is described with."""
    if not option.per_layer:
        return _WHOLE_MODEL
    readers = {*option.feeds, *option.off, *option.on}
    passes = [f"Pass {known}" for known in available_passes() if known in readers]
    return [*passes, *(f"Rule {rule}" for rule in rules_that_read(name))][0]


def permitted(name: str) -> str:
    """Return the values that a field may take, in words."""
    return str(config_options()[name].permitted)


def _field(name: str) -> str:
    option = config_options()[name]
    said = facts(
        [
            ("Expected", str(option.permitted)),
            ("Acts in", "; ".join(_readers(name, option))),
            ("Per layer", "" if option.per_layer else "no, it holds for the whole model"),
        ]
    )
    return directive("py:attribute", f"biofx.BioConfig.{name}", option.doc, said, value=default(name))


def _readers(name: str, option: Option) -> Iterator[str]:
    """Yield the passes and rules on which a field acts, and how."""
    for known in available_passes():
        ways = []
        if known in option.feeds:
            ways.append(f"its option ``{option.feeds[known].option}``")
        if known in option.off:
            ways.append("switches it off")
        if known in option.on:
            ways.append("switches it on")
        if ways:
            yield f"pass :ref:`{known} <pass-{known}>` ({', '.join(ways)})"
    for rule, read in option.rules.items():
        yield f"rule :ref:`{rule} <rule-{rule}>` (its option ``{read.option}``)"
