"""Functions and classes of a user as source text that runs without the file they were written in.

The names they use are included: modules and definitions of installed packages as imports, other functions and
classes of the user as source, and everything else as values for a pickle.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from biofx.errors import InputError


class SourceBundle:
    """Collects the sources, imports and values that one script needs."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        """Values that the source expects under these names."""
        self._imports: dict[str, str] = {}
        self._sources: list[str] = []
        self._bound: dict[str, Any] = {}

    @property
    def source(self) -> str:
        """Imports and definitions, in an order in which they run."""
        return "\n".join([*sorted(set(self._imports.values())), *(f"\n\n{text}" for text in self._sources)])

    def add(self, definition: Any, name: str | None = None) -> str:
        """Add a function or a class, and return its name in the source.

        Raises:
            InputError: its source cannot be found, or it uses something that cannot be included.
        """
        own = getattr(definition, "__name__", "")
        wanted = name or ("carried" if own in ("", "<lambda>") else own)
        self._bind(wanted, definition, wanted)
        return wanted

    def add_value(self, name: str, value: Any) -> str:
        """Add a value, and return its name in the source.

        Raises:
            InputError: its class, or that of a part of it, is not in an installed package.
        """
        self._bind(name, value, name)
        return name

    def _bind(self, name: str, value: Any, asker: str) -> None:
        """Bind a name to a value in the source.

        Raises:
            InputError: the name is bound to another value, or this one cannot be included.
        """
        if name in self._bound:
            if self._bound[name] is not value:
                raise InputError(f"{asker} and something it uses mean different things by {name!r}")
            return
        self._bound[name] = value
        if isinstance(value, ModuleType):
            if not _is_installed(value.__name__):
                raise InputError(f"{asker} uses the module {value.__name__!r}, which is not installed")
            self._imports[name] = f"import {value.__name__}" + (
                f" as {name}" if name != value.__name__ else ""
            )
        elif isinstance(value, (type, FunctionType)) or inspect.isbuiltin(value):
            self._bind_definition(name, value)
        else:
            _check_value(name, value, asker)
            self.values[name] = value

    def _bind_definition(self, name: str, value: Any) -> None:
        module, qualified = str(value.__module__), str(value.__qualname__)
        if _is_installed(module):
            if "<" in qualified or "." in qualified:
                raise InputError(f"{name} = {module}.{qualified} cannot be imported by its name")
            self._imports[name] = f"from {module} import {qualified}" + (
                f" as {name}" if name != qualified else ""
            )
            return
        text = _source_of(value)
        for used, meaning in _meanings(value, text).items():
            if used != value.__name__:
                self._bind(used, meaning, name)
        if value.__name__ == "<lambda>":
            text = f"{name} = {text}"
        elif name != value.__name__:
            text += f"\n\n\n{name} = {value.__name__}"
        self._sources.append(text.rstrip("\n"))


def _source_of(value: Any) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError, IndentationError) as error:
        raise InputError(f"the source of {value.__qualname__} cannot be found: {error}") from error
    return _lambda_in(value, text) if value.__name__ == "<lambda>" else text


def _lambda_in(function: FunctionType, text: str) -> str:
    """Return the text of the only lambda in a statement."""
    for end in range(len(text), 0, -1):  # the lines may be a part of a statement
        try:
            tree = ast.parse(text[:end])
        except SyntaxError:
            continue
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
        if len(found) == 1:
            return str(ast.get_source_segment(text, found[0]))
        break
    raise InputError(f"the lambda in line {function.__code__.co_firstlineno} cannot be cut out; write a def")


def _meanings(value: Any, text: str) -> dict[str, Any]:
    """Return the values of the names that a definition reads from its surroundings."""
    known: dict[str, Any] = {}
    if value.__module__ in sys.modules:
        known.update(vars(sys.modules[value.__module__]))
    for function in _functions_of(value):
        known.update(function.__globals__ if isinstance(value, FunctionType) else {})
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        known.update((name, cell.cell_contents) for name, cell in cells if name != "__class__")
    read = _names_read(compile(text, "<carried>", "exec", dont_inherit=True))
    return {name: known[name] for name in sorted(read) if name in known}


def _names_read(code: CodeType) -> set[str]:
    """Return the names that code, and the functions defined in it, read from their module."""
    found = {
        str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_NAME", "LOAD_GLOBAL")
    }
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return found.union(*map(_names_read, inner))


def _functions_of(value: Any) -> list[FunctionType]:
    if isinstance(value, FunctionType):
        return [value]
    return [entry for entry in vars(value).values() if isinstance(entry, FunctionType)]


def _is_installed(name: str) -> bool:
    """Whether a module belongs to Python or to an installed package, so that other machines have it too."""
    top = name.partition(".")[0]
    if top == "__main__":
        return False
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        return top in sys.stdlib_module_names or top in _packages()
    return file.startswith(_folders()) or top in _packages() or top == __name__.partition(".")[0]


@functools.cache
def _packages() -> Mapping[str, list[str]]:
    return packages_distributions()


@functools.cache
def _folders() -> tuple[str, ...]:
    return tuple(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))


def _check_value(name: str, value: Any, asker: str) -> None:
    """Refuse an object whose class is in a file of the user, which its pickle would import."""
    parts = value.modules() if isinstance(value, nn.Module) else (value,)
    for part in parts:
        module = type(part).__module__
        if not _is_installed(module):
            raise InputError(
                f"{asker} uses {name!r}, which holds a {type(part).__qualname__} of {module}; make it inside "
                f"{asker} instead"
            )
