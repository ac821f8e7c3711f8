"""The README is short, every page is within reach, and every link leads somewhere, to a heading too."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDER = ROOT / "tools" / "docs" / "pages"
PAGES = [README, *sorted([*FOLDER.rglob("*.md"), *ROOT.glob("tools/*/README.md")])]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def links_of(page: Path) -> list[str]:
    """Return where the links of a page go that stay in the repository."""
    links = re.findall(r"\]\(([^)]+)\)", text_of(page))
    return [link for link in links if not link.startswith("https://")]


def anchors_of(page: Path) -> set[str]:
    """Return what links can name of a page: its headings, as repository pages and MyST spell them."""
    outside_of_code = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", outside_of_code, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_readme_can_be_read_in_ten_minutes() -> None:
    assert len(text_of(README).splitlines()) <= 260


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    inside = [link.partition("#")[0] for link in links_of(page)]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_headings(page: Path) -> None:
    missing = []
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        if anchor and anchor not in anchors_of(page.parent / path if path else page):
            missing.append(link)
    assert missing == []


def test_the_picture_of_the_readme_is_the_one_that_its_code_draws(request: pytest.FixtureRequest) -> None:
    path = ROOT / "tools" / "docs" / "rewritten_graph.svg"
    assert f"]({path.relative_to(ROOT)})" in text_of(README)
    made: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(text_of(README)):
        exec(example.source, made)
        if "picture" in made:
            break
    if request.config.getoption("--update-golden"):
        path.write_text(made["picture"], encoding="utf-8")
    assert made["picture"] == text_of(path)


def test_the_first_page_of_the_documentation_names_every_other() -> None:
    index = FOLDER / "index.md"
    named = {(index.parent / link.partition("#")[0]).resolve() for link in links_of(index)}
    assert [name_of(page) for page in PAGES[1:] if page.resolve() not in named and page != index] == []
    assert f"({name_of(index)})" in text_of(README)


def test_the_start_page_leads_to_every_other() -> None:
    start = FOLDER / "start.md"
    linked = {(start.parent / link).resolve() for link in links_of(start)}
    others = {page for page in FOLDER.rglob("*.md") if page.parent != FOLDER}
    assert others <= linked


@pytest.mark.parametrize("page", sorted(FOLDER.glob("howto/*.md")), ids=name_of)
def test_a_how_to_page_runs_code(page: Path) -> None:
    assert re.search(r"^```python$", text_of(page), re.MULTILINE)
