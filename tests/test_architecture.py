"""Imports point in one direction, and the README's map of the code says which."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parent.parent
_BACK_INSIDE_FUNCTIONS = set()  # type: set[tuple[str, str]]


def _files() -> dict[str, Path]:
    """Return every module of the library by its dotted name below ``biofx``."""
    library = ROOT / "biofx"
    paths = [*library.glob("*.py"), *library.glob("*/**/*.py")]
    names = {".".join(path.relative_to(library).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


def _place(module: str) -> str:
    """Return the folder of a module, or its name where it lies in none."""
    return module.partition(".")[0]


def _imports(path: Path, modules: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield what a file imports of the library, and whether it does so where the file begins."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            package, _, inside = str(node.module).partition(".")
            for alias in node.names if package == "biofx" else ():
                longest = ".".join(part for part in (inside, alias.name) if part)
                target = longest if longest in modules else inside
                if target in modules:
                    yield target, node in tree.body


def _arrows() -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Return who imports whom, module by module at their beginning, and folder by folder inside functions."""
    files = _files()
    first, inside = set(), set()
    for module, path in files.items():
        for target, at_once in _imports(path, set(files)):
            if at_once:
                first.add((module, target))
            else:
                inside.add((_place(module), _place(target)))
    return first, inside


def test_there_is_no_circle_of_modules_and_none_of_folders() -> None:
    arrows, _ = _arrows()
    assert len(arrows) > 300
    assert nx.is_directed_acyclic_graph(nx.DiGraph(arrows))
    folders = {(_place(a), _place(b)) for a, b in arrows if _place(a) != _place(b)}
    assert not list(nx.simple_cycles(nx.DiGraph(folders)))


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
    arrows, inside = _arrows()
    between = {(_place(a), _place(b)) for a, b in arrows}
    back = {(a, b) for a, b in between if a in row_of and b in row_of and row_of[a] > row_of[b]}
    assert back == set()
    late = {(a, b) for a, b in inside if a in row_of and b in row_of and row_of[a] > row_of[b]}
    assert late <= _BACK_INSIDE_FUNCTIONS
