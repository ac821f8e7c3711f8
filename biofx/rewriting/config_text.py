"""The options of a config as a table to read, and as a TOML file to start from."""

from __future__ import annotations

import textwrap

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from biofx import toml
from biofx.config import BioConfig, config_options
from biofx.errors import OptionError, suggest
from biofx.options import Option
from biofx.rewriting.catalogue import prose
from biofx.rewriting.registry import available_passes

_WIDTH = 100


def options_of(pass_name: str | None = None, rule: str | None = None) -> dict[str, Option]:
    """Return the options of a config that a pass or a rule reads, or that switch a pass on or off, by field.

    Args:
        pass_name: None for those of all passes.
        rule: None for those of all rules.

    Raises:
        OptionError: there is no such pass or rule, or no rule of that name has options.
    """
    known = sorted(available_passes())
    if pass_name is not None and pass_name not in known:
        raise OptionError(
            f"expected the name of a pass, found {pass_name!r}{suggest(pass_name, known)}; "
            f"there are {', '.join(known)}"
        )
    rules = rules_with_options()
    if rule is not None and rule not in rules:
        raise OptionError(
            f"expected the name of a rule with options, found {rule!r}{suggest(rule, rules)}; "
            f"there are {', '.join(rules)}"
        )
    return {
        name: option
        for name, option in config_options().items()
        if pass_name is None or pass_name in {*option.feeds, *option.off, *option.on}
        if rule is None or rule in option.rules
    }


def rules_with_options() -> list[str]:
    """Return the names of the rules that read fields of a config."""
    return sorted({rule for option in config_options().values() for rule in option.rules})


def describe_config(pass_name: str | None = None, rule: str | None = None) -> RenderableType:
    """Return each option with its default, the values that it may take and its meaning, for ``rich.print``.

    Args:
        pass_name: only the options of this pass; None for all.
        rule: only the options of this rule; None for all.

    Raises:
        OptionError: there is no such pass or rule.
    """
    parts: list[RenderableType] = []
    for name, option in options_of(pass_name, rule).items():
        parts.append(Text.assemble((name, "cyan"), f" = {_default(name)}", (f"  {option.permitted}", "dim")))
        parts.append(Padding(prose(option.doc), (0, 0, 0, 4)))
        said = _where_else(option, rule)
        parts += [Padding(Text(said, "dim"), (0, 0, 0, 4))] if said else []
    return Group(*parts)


def commented_toml(pass_name: str | None = None, rule: str | None = None) -> str:
    """Return a TOML file of the defaults, which says above each what it means; it loads as ``BioConfig()``.

    Args:
        pass_name: only the options of this pass; None for all.
        rule: only the options of this rule; None for all.

    Raises:
        OptionError: there is no such pass or rule.

    >>> print(commented_toml("observe-activity").partition("fuzzy_lr_dynamic")[2].strip())
    = false
    """
    blocks = []
    for name, option in options_of(pass_name, rule).items():
        said = f"{prose(option.doc).plain} Expected: {option.permitted}."
        comment = textwrap.fill(
            said, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        blocks.append(f"{comment}\n{name} = {_default(name)}\n")
    if pass_name is None and rule is None:
        blocks.append(
            "# Other values for some layers: a table for each selector, at the end of the file.\n"
            '# [[overrides]]\n# selector = "layer4.*"\n# fuzzy_learning_rate_factor_nu = 0.1\n'
        )
    return "\n".join(blocks)


def _where_else(option: Option, rule: str | None) -> str:
    """Return what passes and rules call an option, or that an entry of a schedule cannot give it."""
    said = [f"{name}{{{feeds.option}=…}}" for name, feeds in option.feeds.items()]
    for name, at_rule in option.rules.items():
        if rule in (None, name):
            free = at_rule.shapes is None
            said.append(f'Rule("{name}", {at_rule.option}=…)' if free else f"{name} reads it from the config")
    return ", ".join(said)


def _default(name: str) -> str:
    return toml.value_text(BioConfig().to_plain_text()[name])
