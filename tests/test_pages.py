"""The README is short, every link of it and of the pages leads somewhere, and each page is linked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted([*ROOT.glob("tools/docs/pages/**/*.md"), *ROOT.glob("tools/*/README.md")])]


def test_the_readme_can_be_read_in_ten_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 260


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    inside = [link.partition("#")[0] for link in links if not link.startswith("https://")]
    assert [link for link in inside if not (page.parent / link).exists()] == []


def test_the_first_page_of_the_documentation_names_every_other() -> None:
    index = ROOT / "tools" / "docs" / "pages" / "index.md"
    links = re.findall(r"\]\(([^)]+)\)", index.read_text(encoding="utf-8"))
    named = {(index.parent / link).resolve() for link in links}
    assert [page for page in PAGES[1:] if page.resolve() not in named and page != index] == []
    assert f"({index.relative_to(ROOT)})" in README.read_text(encoding="utf-8")
