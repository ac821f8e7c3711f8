"""A config as a shell and a notebook show it: what differs from the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from biofx.callables import callable_to_text
from biofx.errors import OptionError
from biofx.html_tables import folded, paragraph, table
from biofx.options import declared_options
from biofx.select import Override


def changed_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config that differ from their defaults, without overrides."""
    options = declared_options(type(config))
    fields = [field for field in dataclasses.fields(config) if field.name in options]
    values = {field.name: getattr(config, field.name) for field in fields}
    return {field.name: values[field.name] for field in fields if values[field.name] != field.default}


def config_repr(config: Any) -> str:
    """Return the expression that makes a config; functions without a name are shown in angle brackets."""
    parts = [f"{type(config).__name__}({_arguments(changed_fields(config))})"]
    for override in config.overrides:
        selector = _selector(override.selector)
        parts.append(f".override({selector}, {_arguments(dict(override.options))})")
    return "".join(parts)


def config_html(config: Any) -> str:
    """Return tables of what differs from the defaults, and folded, of all fields."""
    options, changed = declared_options(type(config)), changed_fields(config)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    rows = [(name, _value(value), _value(defaults[name])) for name, value in changed.items()]
    parts = [f"<b>{type(config).__name__}</b>"]
    parts.append(
        table(["field", "value", "default"], rows) if rows else paragraph("all fields have defaults")
    )
    if config.overrides:
        parts.append(table(["layers", "field", "value"], _override_rows(config.overrides)))
    every = [(name, _value(getattr(config, name)), option.doc) for name, option in options.items()]
    parts.append(folded(f"all {len(every)} fields", table(["field", "value", "meaning"], every)))
    return "".join(parts)


def _override_rows(overrides: tuple[Override, ...]) -> Iterator[tuple[str, str, str]]:
    for override in overrides:
        for name, value in override.options:
            yield _selector(override.selector), name, _value(value)


def _arguments(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: Any) -> str:
    if isinstance(value, Enum):
        return repr(value.value)
    if not callable(value):
        return repr(value)
    try:
        return repr(callable_to_text(value))
    except OptionError:
        return f"<{getattr(value, '__qualname__', type(value).__name__)}>"


def _selector(selector: Any) -> str:
    if isinstance(selector, (list, tuple)):
        return f"[{', '.join(map(_selector, selector))}]"
    return repr(selector) if isinstance(selector, str) else _value(selector)
