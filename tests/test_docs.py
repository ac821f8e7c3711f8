"""The site is built without a warning, and has everything that the code declares."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import biofx
from biofx import errors
from biofx.cli import _parser
from biofx.config import config_options
from biofx.options import declared_options
from biofx.plasticity import BioModule
from biofx.rewriting import Pass, available_passes

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "docs"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None, reason="Sphinx is not installed: pip install -e '.[docs]'"
)


def build(folder: Path, tool: Path = TOOL) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(tool), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)  # warnings are errors: pages in no order, links, references, docstrings, duplicates
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def anchors(page: Path) -> set[str]:
    return set(re.findall(r'id="([^"]+)"', page.read_text(encoding="utf-8")))


def test_every_option_has_its_place(site: Path) -> None:
    found = anchors(site / "reference" / "options.html")
    assert {f"biofx.BioConfig.{name}" for name in config_options()} <= found


def test_every_pass_and_each_of_its_options_has_its_place(site: Path) -> None:
    found, public = (
        anchors(site / "reference" / "passes.html"),
        anchors(site / "reference" / "biofx.passes.html"),
    )
    for name, cls in available_passes().items():
        assert f"pass-{name}" in found
        assert f"biofx.passes.{cls.__name__}" in public
        own = set(declared_options(cls)) - set(declared_options(Pass))
        assert {f"biofx.passes.{cls.__name__}.{option}" for option in own} <= found


def test_every_rule_has_its_place(site: Path) -> None:
    wanted = {f"rule-{name}".replace("_", "-") for name in BioModule.exposed_functions}
    assert wanted <= anchors(site / "reference" / "rules.html")


def test_every_error_has_its_place(site: Path) -> None:
    found = anchors(site / "reference" / "errors.html")
    assert {f"biofx.errors.{name}" for name in errors.__all__} <= found


def test_every_command_has_its_place(site: Path) -> None:
    page = (site / "reference" / "command_line.html").read_text(encoding="utf-8")
    (commands,) = (action for action in _parser()._actions if action.choices and not action.option_strings)
    assert [name for name in commands.choices or () if f"biofx {name}" not in page] == []


def test_every_public_name_has_its_place(site: Path) -> None:
    pages = {path.stem: anchors(path) for path in (site / "reference").glob("*.html")}
    everywhere = set().union(*pages.values())
    for module in ("biofx", *(name for name in pages if name.startswith("biofx."))):
        for name in getattr(importlib.import_module(module), "__all__", ()):
            is_there = any(anchor.endswith(f".{name}") for anchor in everywhere)
            assert is_there or name == "passes", f"{module}.{name}"
    assert set(pages) >= {
        f"biofx.{name}" for name in ("passes", "select", "rewriting", "diagnostics", "graph")
    }
    assert len(set(biofx.__all__)) > 25


def test_every_page_is_in_the_order_of_the_first(site: Path) -> None:
    pages = {path.relative_to(TOOL / "pages").with_suffix(".html") for path in (TOOL / "pages").rglob("*.md")}
    index = (site / "index.html").read_text(encoding="utf-8")
    assert [str(page) for page in pages if f'href="{page}"' not in index and page.stem != "index"] == []


def test_links_between_the_pages_lead_somewhere(site: Path) -> None:
    """Sphinx checks those of the pages; this also those that its theme and ours make."""
    found = {path: anchors(path) for path in site.rglob("*.html")}
    broken = []
    for path in found:
        for link in re.findall(r'(?:href|src)="([^"]+)"', path.read_text(encoding="utf-8")):
            name, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (path.parent / name.partition("?")[0]).resolve() if name else path
            if not target.exists() or (anchor and target in found and anchor not in found[target]):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', text) == [], path
        assert re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="(?:https?:)?//', text) == [], path
