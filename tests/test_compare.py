"""The README's comparison says what is measured."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "tools" / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module
    spec.loader.exec_module(module)
    return module


def test_the_readmes_table_is_what_is_measured(compare: ModuleType) -> None:
    told = compare.told_in((ROOT / "README.md").read_text(encoding="utf-8"))
    assert list(told) == list(compare.ROWS)
    for contender in compare.contenders():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if contender.name.startswith("reference") else "error")
            found = {row: compare.measure(contender, row) for row in compare.ROWS}
        assert found == {row: entries[contender.name] for row, entries in told.items()}


def test_a_difference_is_found(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "ROWS", {"layers reported on": lambda contender: "2 of 3"})
    assert compare.main() == 1
    assert "layers reported on, biofx: the README says '3 of 3', found '2 of 3'" in capsys.readouterr().out
