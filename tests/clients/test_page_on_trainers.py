"""The blocks of the page on trainers run as they stand, each with its package, and print what they say."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "tools" / "docs" / "pages" / "howto" / "trainers.md"
BLOCKS = dict(re.findall(r"^```python\n# (\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S))


def test_the_page_has_a_block_for_each_trainer() -> None:
    assert list(BLOCKS) == ["lightning", "transformers", "accelerate", "skorch"]


@pytest.mark.parametrize("package", BLOCKS)
def test_a_block_runs(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(BLOCKS[package], f"{PAGE.name}, {package}", "exec"), {"__name__": package})
    said = re.findall(r"^print\(.*\)  # (.*)$", BLOCKS[package], re.M)
    assert said
    assert told.getvalue().splitlines()[-len(said) :] == said
