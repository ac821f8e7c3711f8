"""The comparison says what is measured."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def compare() -> Iterator[ModuleType]:
    """Import the table as ``python tools/compare`` does: what lies beside it is found by its name."""
    folder = ROOT / "tools" / "compare"
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("table")
    finally:
        sys.path.remove(str(folder))
        for path in folder.glob("*.py"):
            if path.stem != "__main__":
                sys.modules.pop(path.stem, None)


def test_the_readmes_table_is_what_is_measured(compare: ModuleType) -> None:
    told = compare.told_in((ROOT / "tools" / "compare" / "README.md").read_text(encoding="utf-8"))
    assert list(told) == list(compare.ROWS)
    for contender in compare.contenders():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if contender.name.startswith("reference") else "error")
            found = {row: compare.measure(contender, row) for row in compare.ROWS}
        assert found == {row: entries[contender.name] for row, entries in told.items()}


def test_a_difference_is_found(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in list(compare.ROWS):
        monkeypatch.delitem(compare.ROWS, row)
    monkeypatch.setitem(compare.ROWS, "layers reported on", lambda contender: "3 of 3")
    assert compare.main() == 1
    out = capsys.readouterr().out
    assert "layers reported on, by hand: the README says '0 of 3', found '3 of 3'" in out
    assert "layers reported on, biofx: " not in out
