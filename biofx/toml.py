"""TOML files: the standard library reads them; this writes the flat tables biofx needs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biofx.errors import OptionError
from biofx.whole_file import whole_file

_MOST_BYTES = 2**20


def read(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        OptionError: the file cannot be read, is not TOML, or is far too large for a config.
    """
    try:
        parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise OptionError("reading TOML on Python 3.10 needs tomli: pip install 'biofx[toml]'") from None
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise OptionError(f"expected a config of at most {_MOST_BYTES} bytes, found a larger file")
        tables: dict[str, Any] = parser.loads(content.decode("utf-8"))
    except OptionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"expected a readable TOML file: {error}") from error
    return tables


def write(path: str | Path, table: Mapping[str, Any]) -> None:
    """Write ``table``, whole or not at all. Lists of mappings become arrays of tables, at the end.

    Raises:
        OptionError: a value TOML has no form for, or a file that cannot be written.
    """
    nested = {key: value for key, value in table.items() if _is_array_of_tables(value)}
    lines = [
        f"{key} = {value_text(value)}" for key, value in table.items() if key not in nested and value != []
    ]
    for key, entries in nested.items():
        for entry in entries:
            lines += ["", f"[[{key}]]"]
            lines += [f"{name} = {value_text(value)}" for name, value in entry.items()]
    write_whole(path, "\n".join(lines) + "\n")


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part.

    Raises:
        OptionError: the file cannot be written.
    """
    try:
        with whole_file(path) as file:
            file.write(text.encode("utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write {path}: {error}") from error


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def value_text(value: Any) -> str:
    """Return a value as it stands in a TOML file.

    Raises:
        OptionError: TOML has no form for it.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(value_text(entry) for entry in value)}]"
    raise OptionError(f"expected a value that TOML can carry (text, number, flag, list), found {value!r}")
