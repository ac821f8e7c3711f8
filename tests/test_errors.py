"""The exception tree and the hints that errors carry."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import biofx
from biofx import errors

LIBRARY = Path(__file__).parent.parent


def test_every_error_is_exported_and_drawn_in_the_docstring() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.BiofxError)
    }
    drawn = set(re.findall(r"\w+Error\b", str(errors.__doc__))) - {
        *("TypeError", "ValueError", "LookupError", "ImportError")
    }
    assert drawn == defined
    assert defined == set(errors.__all__) - {"BiofxWarning"}
    assert defined & set(biofx.__all__) == {"BiofxError", "CaptureError", "OptionError"}


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.InputError, TypeError),
        (errors.OptionError, ValueError),
        (errors.SelectorError, LookupError),
        (errors.PipelineError, ValueError),
    ],
)
def test_an_error_is_also_the_builtin_that_callers_expect(
    error: type[errors.BiofxError], builtin: type[Exception]
) -> None:
    with pytest.raises(builtin, match="why") as caught:
        raise error("why")
    assert isinstance(caught.value, errors.BiofxError)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_says_what_to_do(name: str) -> None:
    _, remedy, said = str(vars(errors)[name].__doc__).partition("Remedy: ")
    assert remedy
    assert len(said.split()) > 8


def test_suggest_names_the_nearest_first() -> None:
    assert errors.suggest("gama", ["nu", "gamma"]) == "; did you mean 'gamma'?"
    assert errors.suggest("fc2", ["fc1", "stem", "fc22"]) == "; did you mean 'fc22' or 'fc1'?"


def test_suggest_is_silent_when_nothing_is_near() -> None:
    assert errors.suggest("zzz", ["gamma", "nu"]) == ""


def test_suggest_names_no_name_twice() -> None:
    assert errors.suggest("fc3", ["fc1", "fc1"]) == "; did you mean 'fc1'?"


def test_suggest_keeps_to_its_limit() -> None:
    assert errors.suggest("fc9", [f"fc{digit}" for digit in range(8)], limit=2).count("'fc") == 2


def test_a_note_is_attached_where_python_can_show_one() -> None:
    class NotableError(Exception):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def add_note(self, note: str) -> None:
            self.notes.append(note)

    notable = NotableError()
    errors.add_note(notable, "raised by pass x")
    assert notable.notes == ["raised by pass x"]


def test_every_warning_is_of_one_class_but_for_the_deprecation_of_names() -> None:
    """Filters and programs that turn warnings into errors name one class."""
    found = []
    for path in sorted([*LIBRARY.glob("biofx/**/*.py"), *LIBRARY.glob("passes/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn"):
                given = [*node.args[1:], *(word.value for word in node.keywords if word.arg == "category")]
                found.append((path.relative_to(LIBRARY).as_posix(), ast.unparse(given[0]) if given else ""))
    assert len(found) >= 5
    deprecated = [place for place, kind in found if kind == "DeprecationWarning"]
    assert deprecated == ["biofx/__init__.py"]
    assert {kind for _, kind in found} == {"BiofxWarning", "DeprecationWarning"}
    assert issubclass(errors.BiofxWarning, UserWarning)
