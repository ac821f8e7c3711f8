"""The first hour of a user: a clean environment, the wheel, the start page, commands, a notebook.

Nothing of it needs the sources, and nothing is longer than a screen that was not asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from package import build, fresh_environment

ROOT = Path(__file__).parent.parent
LINES, COLUMNS = 40, 100
"""A screen."""

PLAY = '''
"""Runs cells from a file, as a shell or a notebook does; writes down what each shows."""
import ast, contextlib, io, json, sys

cells, shown = json.load(open(sys.argv[1])), []
names = {"__name__": "__main__"}
for cell in cells:
    out, tree = io.StringIO(), ast.parse(cell)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        exec(compile(tree, "cell", "exec"), names)
        found = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
        if found is not None:
            print(repr(found))
    page = found._repr_html_() if hasattr(found, "_repr_html_") else ""
    shown.append({"cell": cell, "text": out.getvalue(), "page": len(page or "")})
json.dump(shown, open(sys.argv[2], "w"))
'''
MODEL = '''
from torch import nn


def network():
    """Return a small network of convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
'''


class User:
    """Types commands and code in an environment that has nothing but the wheel and what it asks for."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self.folder = python, folder
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "COLUMNS": str(COLUMNS),
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        }

    def types(self, *command: str, code: int = 0) -> str:
        """Run a command; return what it prints."""
        done = subprocess.run(
            [str(self._python.parent / command[0]), *command[1:]],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env=self._environment,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def plays(self, cells: list[str]) -> list[dict[str, Any]]:
        """Run cells of Python one after another; return what each shows."""
        (self.folder / "play.py").write_text(PLAY)
        (self.folder / "cells.json").write_text(json.dumps(cells))
        self.types("python", "-W", "error::biofx.BiofxWarning", "play.py", "cells.json", "shown.json")
        shown: list[dict[str, Any]] = json.loads((self.folder / "shown.json").read_text())
        return shown


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    folder = tmp_path_factory.mktemp("hour")
    _, wheel = build(folder)
    python = fresh_environment(folder / "environment", wheel, "scikit-learn", "matplotlib")
    work = folder / "work"
    work.mkdir()
    (work / "model.py").write_text(MODEL)
    return User(python, work)


def assert_fits_on_a_screen(text: str, what: str) -> None:
    lines = text.splitlines()
    assert len(lines) <= LINES, f"{what}: {len(lines)} lines"
    assert len(text) <= LINES * COLUMNS, f"{what}: {len(text)} characters"


COMMANDS = {
    "version": ["--version"],
    "help": ["--help"],
    "transform": [
        "transform",
        "model.py:network",
        "--set",
        "weight_splitting_Gamma=2",
        "--html",
        "report.html",
    ],
    "one pass": ["config", "--pass", "split-weights"],
    "one rule": ["config", "--rule", "synaptic_scaling"],
    "explain": ["explain", "model.py:network", "0"],
    "demo": ["demo", "--seeds", "1", "--tasks", "2"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_command_shows_a_screen(user: User, command: list[str]) -> None:
    assert_fits_on_a_screen(user.types("biofx", *command), " ".join(command))


def test_a_mistake_is_one_line_that_says_what_to_do(user: User) -> None:
    said = user.types("biofx", "transform", "model.py:network", "--set", "weight_spliting_Gamma=2", code=1)
    assert len(said.strip().splitlines()) == 1
    assert "did you mean 'weight_splitting_Gamma'" in said
    assert str(user.folder) not in said


def test_a_file_of_options_is_written_and_read(user: User) -> None:
    (user.folder / "my.toml").write_text(user.types("biofx", "config", "--toml"))
    assert_fits_on_a_screen(
        user.types("biofx", "transform", "model.py:network", "--config", "my.toml"), "with a file"
    )


def test_the_start_page_is_played(user: User) -> None:
    import doctest

    page = (ROOT / "tools" / "docs" / "pages" / "start.md").read_text(encoding="utf-8")
    examples = doctest.DocTestParser().get_examples(page)
    assert len(examples) > 15
    things = ["config", "report", "bio_model", "renewed", "plasticity", "biofx.check(bio_model)"]
    things += ["biofx.Monitor()", "biofx.unit_groups(bio_model)", "biofx.transform(model, config)"]
    shown = user.plays([*(example.source for example in examples), *things, "print(report.summary())"])
    for cell in shown:
        assert_fits_on_a_screen(cell["text"], cell["cell"])
        assert cell["page"] < 200_000
    for example, cell in zip(examples, shown, strict=False):
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(example.want, cell["text"], flags), cell["text"]
    pages = {cell["cell"]: cell["page"] for cell in shown}
    assert pages["report"] > 0
    assert pages["config"] > 0


def test_a_notebook_is_played(user: User) -> None:
    notebook = json.loads(
        (ROOT / "tools" / "tutorials" / "pretrained_dale.ipynb").read_text(encoding="utf-8")
    )
    cells, folder = [], str(ROOT / "tools" / "tutorials")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cells.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", ()):
                cells.append("EPOCHS, IMAGES = 1, 200")
    shown = user.plays(
        [f"import sys, matplotlib; sys.path.append({folder!r}); matplotlib.use('agg')", *cells]
    )
    assert any("EPOCHS, IMAGES" in cell["cell"] for cell in shown)
    for cell in shown:
        assert_fits_on_a_screen(cell["text"], cell["cell"])
        assert cell["page"] < 200_000
