"""How messages name an option of a pass: as the pass does, and as the config does."""

from __future__ import annotations

from typing import Any

from biofx.config import config_options


def named_option(pass_name: str, option: str, *value: Any) -> str:
    """Return the name of a pass's option with its value, if one is given, and that of the field behind it.

    >>> named_option("constrain-signs", "constrain_inputs", False)
    'constrain_inputs=False, in a config dales_constrain_inputs'
    >>> named_option("constrain-signs", "signs")
    'signs, in a config dales_signs'
    """
    field = next(
        name
        for name, declared in config_options().items()
        if pass_name in declared.feeds and declared.feeds[pass_name].option == option
    )
    shown = f"{option}={value[0]!r}" if value else option
    return f"{shown}, in a config {field}"
