"""Imports point in one direction, and the README's map of the code says which."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import networkx as nx

ROOT = Path(__file__).parent.parent
Where: TypeAlias = Literal["top", "function", "types"]
"""Where a file imports another: at its top, inside a function, or for type checkers alone."""


def _files() -> dict[str, Path]:
    """Return every module of the library by its dotted name below ``biofx``."""
    library = ROOT / "biofx"
    paths = [*library.glob("*.py"), *library.glob("*/**/*.py")]
    names = {".".join(path.relative_to(library).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


def _place(module: str) -> str:
    """Return the folder of a module, or its name where it lies in none."""
    return module.partition(".")[0]


def _imports(path: Path, modules: set[str]) -> Iterator[tuple[str, Where]]:
    """Yield the modules of the library that a file imports, and where it does so."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            package, _, inside = str(node.module).partition(".")
            for alias in node.names if package == "biofx" else ():
                longest = ".".join(part for part in (inside, alias.name) if part)
                target = longest if longest in modules else inside
                if target in modules:
                    yield (
                        target,
                        "types" if id(node) in for_types else "top" if node in tree.body else "function",
                    )


def _arrows(*places: Where) -> set[tuple[str, str]]:
    """Return which module imports which, in some places of a file."""
    files = _files()
    return {
        (module, target)
        for module, path in files.items()
        for target, where in _imports(path, set(files))
        if where in places
    }


def _circles(arrows: set[tuple[str, str]]) -> list[list[str]]:
    groups = nx.strongly_connected_components(nx.DiGraph(arrows))
    return [sorted(group) for group in groups if len(group) > 1]


def test_there_is_no_circle_of_files_not_even_through_imports_inside_functions() -> None:
    arrows = _arrows("top", "function")
    assert len(arrows) > 300
    assert _circles(arrows) == []


def test_files_that_know_each_other_for_types_alone_are_in_one_folder() -> None:
    circles = _circles(_arrows("top", "function", "types"))
    assert [names for names in circles if len(set(map(_place, names))) > 1] == []


def test_there_is_no_circle_of_folders() -> None:
    arrows = _arrows("top", "function", "types")
    assert _circles({(_place(a), _place(b)) for a, b in arrows if _place(a) != _place(b)}) == []


def test_the_map_in_the_readme_is_in_the_order_of_the_arrows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Finding your way in the code")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    row_of = {
        name.rstrip("/").removesuffix(".py").rpartition("/")[2]: number
        for number, row in enumerate(rows)
        for name in re.findall(r"`([^`]+)`", row)
    }
    folders = {path.parent.name for path in ROOT.glob("biofx/*/__init__.py")}
    assert folders <= set(row_of)
    known = {_place(module) for module in _files()}
    assert set(row_of) <= known
    between = {(_place(a), _place(b)) for a, b in _arrows("top", "function", "types")}
    back = {(a, b) for a, b in between if a in row_of and b in row_of and row_of[a] > row_of[b]}
    assert back == set()
