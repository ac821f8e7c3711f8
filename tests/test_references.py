"""Every cross reference in a docstring leads to something that exists."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import biofx

ROOT = Path(__file__).parent.parent
_REFERENCE = re.compile(r":(?:py:)?(?:func|class|mod|data|attr|meth|exc|const|obj):`([^`]+)`")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the name and the file of each module of the library."""
    for folder, package in ((ROOT / "biofx", "biofx"), (ROOT / "passes", "biofx.passes")):
        for path in sorted(folder.rglob("*.py")):
            if not path.is_relative_to(ROOT / "biofx" / "passes"):
                parts = path.relative_to(folder).with_suffix("").parts
                yield ".".join([package, *parts]).removesuffix(".__init__"), path


def docstrings(tree: ast.Module) -> Iterator[tuple[list[str], str]]:
    """Yield each docstring of a file, those beneath fields too, with the names of the classes around it."""

    def walk(node: ast.AST, classes: list[str]) -> Iterator[tuple[list[str], str]]:
        if isinstance(node, _DOCUMENTED):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    yield classes, str(statement.value.value)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, [*classes, child.name] if isinstance(child, ast.ClassDef) else classes)

    return walk(tree, [])


def member(owner: Any, name: str) -> Any:
    """Return what an object has, or says that its instances have, under a name.

    Raises:
        AttributeError: it has nothing of that name.
    """
    bases = owner.__mro__ if isinstance(owner, type) else ()
    if any(name in vars(base).get("__annotations__", {}) for base in bases):
        return getattr(owner, name, object())
    return getattr(owner, name)


def found(target: str, module: ModuleType, classes: list[str]) -> bool:
    """Whether a target exists: in the classes around, in the module, among builtins, or as a full path."""
    path = target.removeprefix("~").removeprefix(".").removesuffix("()")
    scopes: list[Any] = [module, builtins]
    inner: Any = module
    for name in classes:
        inner = getattr(inner, name, None)
        scopes.insert(0, inner)
    for scope in scopes:
        try:
            held = scope
            for part in path.split("."):
                held = member(held, part)
        except AttributeError:
            continue
        return True
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            held = importlib.import_module(".".join(parts[:length]))
            for part in parts[length:]:
                held = member(held, part)
        except (ImportError, AttributeError):
            continue
        return True
    return False


def dead() -> tuple[list[str], int]:
    """Return the references that lead nowhere, and how many there are in all."""
    count, missing = 0, []
    for name, path in modules():
        module = importlib.import_module(name)
        for classes, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _REFERENCE.findall(text):
                count += 1
                shown = re.search(r"<([^>]+)>", target)
                if not found(shown[1] if shown else target, module, classes):
                    missing.append(f"{path.relative_to(ROOT)}: {target}")
    return missing, count


def test_every_reference_in_a_docstring_leads_somewhere() -> None:
    missing, count = dead()
    assert count > 100
    assert missing == []


def test_a_dead_reference_is_found() -> None:
    assert found("biofx.transform", biofx, [])
    assert found("~biofx.checkpoints.Checkpoint.read", biofx, [])
    assert found("Rule.every", biofx, [])
    assert not found("biofx.nothing", biofx, [])
    assert not found("Rule.nothing", biofx, [])
