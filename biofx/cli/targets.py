"""Models and scripts that a command names."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from biofx.errors import InputError, suggest
from biofx.random_state import preserved_random_state


def examples_of(options: argparse.Namespace) -> Any:
    """Return the example inputs that ``--example`` describes, None without.

    Raises:
        OptionError: a text describes no tensor.
    """
    from biofx.capture.example_text import examples_from_text

    return examples_from_text(options.example) if options.example else None


def load_target(target: str) -> nn.Module:
    """Return the model that ``MODULE:NAME`` or ``FILE.py:NAME`` leads to.

    ``NAME`` is a module, or anything that returns one when called without arguments.

    Raises:
        InputError: the text is not of that form, or nothing, or no model, is there.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"expected MODULE:NAME or FILE.py:NAME, found {target!r}")
    with preserved_random_state():
        return model_in(_import(place), name, place)


def model_in(found: Any, name: str, place: str) -> nn.Module:
    """Return the model of that name in a module; ``place`` is what messages call it.

    Raises:
        InputError: nothing, or no model, is there.
    """
    target = f"{place}:{name}"
    with preserved_random_state():
        for part in name.split("."):
            if not hasattr(found, part):
                raise InputError(f"{place!r} has no {part!r}{suggest(part, dir(found))}")
            found = getattr(found, part)
        if isinstance(found, nn.Module):
            return found
        try:
            made = found() if callable(found) else found
        except Exception as error:
            raise InputError(
                f"expected a model from {target}(), which fails: {_first_line(error)}"
            ) from error
    if not isinstance(made, nn.Module):
        raise InputError(f"expected {target!r} to give a torch.nn.Module, found a {type(made).__name__}")
    return made


def load_script(path: str | Path) -> ModuleType:
    """Return what a Python file defines; a file that was read before is read again.

    Raises:
        InputError: there is none, or it fails.
    """
    with preserved_random_state():
        return _import_file(Path(path))


def _import(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _import_file(Path(place))
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise InputError(f"cannot import {place!r}: {_first_line(error)}") from error


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"expected a Python file, found none at {str(path)!r}")
    beside = str(path.resolve().parent)
    if beside not in sys.path:  # as Python does for a script: it may import what lies beside it
        sys.path.insert(0, beside)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise InputError(f"cannot import {str(path)!r}: {_first_line(error)}") from error
    return module


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
