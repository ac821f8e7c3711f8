"""Values of config fields as a user writes them: as in Python, in TOML, or in the text of a pipeline."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from biofx.cli.options import split_override
from biofx.config import BioConfig
from biofx.errors import OptionError
from biofx.rewriting.pass_text import parse_value


def config_of(options: argparse.Namespace) -> BioConfig:
    """Return the config that ``--config``, ``--set`` and ``--override`` say, in this order.

    Raises:
        OptionError: the file, a field, a value or the form of an override is wrong.
    """
    config = BioConfig.from_toml(options.config) if options.config else BioConfig()
    config = config.replace(**assignments(options.set))
    found = [_override(text) for text in options.override]
    for selector, entries in groupby(found, key=lambda entry: entry[0]):
        fields = [field for _, given in entries for field in given]
        config = config.override(selector, **assignments(fields))
    return config


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of texts of the form ``FIELD=VALUE``, by field.

    Raises:
        OptionError: a text is of another form.
    """
    fields = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"expected FIELD=VALUE, found {text!r}")
        fields[name.strip()] = read_value(value)
    return fields


def read_value(text: str) -> Any:
    """Return a value as Python, TOML or the text of a pipeline spell it; a text that is none is one itself.

    >>> [read_value(text) for text in ("True", "true", "None", "1e-3", "(1, 2)", "[[0.5, 1], [0, 1]]")]
    [True, True, None, 0.001, (1, 2), [[0.5, 1], [0, 1]]]
    >>> [read_value(text) for text in ('"normal"', "'normal'", "normal", "torch.tanh", "110 011", "[true]")]
    ['normal', 'normal', 'normal', 'torch.tanh', '110 011', [True]]
    """
    stripped = text.strip()
    try:
        return ast.literal_eval(stripped)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    found = _as_toml(stripped)
    return parse_value(text) if found is None else found


def _as_toml(text: str) -> Any:
    """Return a flag, number, text or list as TOML spells it, None for anything else."""
    try:
        parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        found = parser.loads(f"value = {text}")
    except (ImportError, ValueError, RecursionError):
        return None
    value = found.get("value")
    return value if len(found) == 1 and isinstance(value, (bool, int, float, str, list)) else None


def _override(text: str) -> tuple[str, list[str]]:
    found = split_override(text)
    if found is None:
        raise OptionError(
            f'--override: expected "SELECTOR: FIELD=VALUE, FIELD=VALUE", found {text!r}; for example '
            '--override "layer4.*: weight_splitting_Gamma=2"'
        )
    return found
