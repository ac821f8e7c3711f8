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


def options_of(pass_name: str | None = None) -> dict[str, Option]:
    """Return the options of a config that a pass reads, or that switch it on or off, by field.

    Args:
        pass_name: None for all options.

    Raises:
        OptionError: there is no such pass.
    """
    options = config_options()
    if pass_name is None:
        return dict(options)
    known = sorted(available_passes())
    if pass_name not in known:
        raise OptionError(
            f"expected the name of a pass, found {pass_name!r}{suggest(pass_name, known)}; "
            f"there are {', '.join(known)}"
        )
    return {
        name: option
        for name, option in options.items()
        if pass_name in option.feeds or pass_name in option.off or pass_name in option.on
    }


def describe_config(pass_name: str | None = None) -> RenderableType:
    """Return each option with its default, the values that it may take and its meaning, for ``rich.print``.

    Args:
        pass_name: only the options of this pass; None for all.

    Raises:
        OptionError: there is no such pass.
    """
    parts: list[RenderableType] = []
    for name, option in options_of(pass_name).items():
        parts.append(Text.assemble((name, "cyan"), f" = {_default(name)}", (f"  {option.permitted}", "dim")))
        parts.append(Padding(prose(option.doc), (0, 0, 0, 4)))
    return Group(*parts)


def commented_toml(pass_name: str | None = None) -> str:
    """Return a TOML file of the defaults, which says above each what it means; it loads as ``BioConfig()``.

    Args:
        pass_name: only the options of this pass; None for all.

    Raises:
        OptionError: there is no such pass.

    >>> print(commented_toml("observe-activity").partition("fuzzy_lr_dynamic")[2].strip())
    = false
    """
    blocks = []
    for name, option in options_of(pass_name).items():
        said = f"{prose(option.doc).plain} Expected: {option.permitted}."
        comment = textwrap.fill(
            said, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        blocks.append(f"{comment}\n{name} = {_default(name)}\n")
    if pass_name is None:
        blocks.append(
            "# Other values for some layers: a table for each selector, at the end of the file.\n"
            '# [[overrides]]\n# selector = "layer4.*"\n# fuzzy_learning_rate_factor_nu = 0.1\n'
        )
    return "\n".join(blocks)


def _default(name: str) -> str:
    return toml.value_text(BioConfig().to_plain_text()[name])
