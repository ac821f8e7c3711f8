"""The API reference is written whole, from docstrings that can be rendered."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import biofx

TOOL = Path(__file__).parent.parent / "tools" / "reference.py"


def test_every_public_name_has_its_place_in_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc is not installed: pip install -e '.[docs]'")
    runpy.run_path(str(TOOL))["main"](tmp_path)
    page = (tmp_path / "biofx.html").read_text(encoding="utf-8")
    names = [name for name in biofx.__all__ if name != "passes"]  # a module has a page
    assert [name for name in names if f'id="{name}"' not in page] == []
    passes = (tmp_path / "biofx" / "passes.html").read_text(encoding="utf-8")
    assert [name for name in biofx.passes.__all__ if f'id="{name}"' not in passes] == []
    selectors = (tmp_path / "biofx" / "select.html").read_text(encoding="utf-8")
    assert "a glob over module paths and node names" in selectors
