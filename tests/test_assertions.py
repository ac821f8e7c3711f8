"""Every test checks something: a claim of its own, or one of a function that it calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
_CHECKS = ("raises", "warns", "fail", "golden", "check", "unchanged")
"""Calls that fail by themselves: of pytest, of the fixtures, and helpers that are named for it."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def called(function: ast.AST) -> set[str]:
    """Return the names of what is called, without the module or object before the dot."""
    targets = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {
        target.attr if isinstance(target, ast.Attribute) else target.id
        for target in targets
        if isinstance(target, (ast.Attribute, ast.Name))
    }


def asserts(function: ast.AST) -> bool:
    """Whether a function has an assertion of its own, or raises one."""
    return any(isinstance(node, ast.Assert) for node in ast.walk(function)) or any(
        name in _CHECKS or name.startswith("assert_") for name in called(function)
    )


def checking(trees: list[ast.Module]) -> set[str]:
    """Return the functions of some files that assert something, themselves or through others."""
    known = {function.name: function for tree in trees for function in functions(tree)}
    found = {name for name, function in known.items() if asserts(function)}
    while more := {name for name in known.keys() - found if called(known[name]) & found}:
        found |= more
    return found


def empty(source: str, *others: str) -> list[str]:
    """Return the tests in a file's text that check nothing; helpers may be in other texts."""
    tree = ast.parse(source)
    found = checking([tree, *map(ast.parse, others)])
    return [f.name for f in functions(tree) if f.name.startswith("test_") and f.name not in found]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.name)
def test_every_test_of_a_file_checks_something(path: Path) -> None:
    helpers = [other for other in TESTS.rglob("*.py") if not other.name.startswith("test_")]
    assert (
        empty(path.read_text(encoding="utf-8"), *(other.read_text(encoding="utf-8") for other in helpers))
        == []
    )


def test_a_test_without_a_check_is_found() -> None:
    assert empty("def test_a():\n    run()\ndef run():\n    pass") == ["test_a"]
    assert empty("def test_a():\n    run()", "def run():\n    assert f()") == []
    assert empty("def test_a():\n    with pytest.raises(ValueError):\n        f()") == []
