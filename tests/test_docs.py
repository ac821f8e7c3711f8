"""The site is built without a warning, and has everything that the code declares."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import biofx
from biofx import errors
from biofx.cli.parser import make_parser
from biofx.config import config_options
from biofx.options import declared_options
from biofx.plasticity import BioModule
from biofx.rewriting import Pass, available_passes
from docs.staging import Stage, StagingError

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "docs"


def build(folder: Path, tool: Path = TOOL) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(tool), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("Sphinx is not installed: pip install -e '.[docs]'")
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
    (commands,) = (
        action for action in make_parser()._actions if action.choices and not action.option_strings
    )
    assert [name for name in commands.choices or () if f"biofx {name}" not in page] == []


def test_every_public_name_has_its_place(site: Path) -> None:
    pages = {path.stem: anchors(path) for path in (site / "reference").glob("*.html")}
    everywhere = set().union(*pages.values())
    for module in ("biofx", *(name for name in pages if name.startswith("biofx."))):
        for name in getattr(importlib.import_module(module), "__all__", ()):
            is_there = any(anchor.endswith(f".{name}") for anchor in everywhere)
            assert is_there or name == "passes", f"{module}.{name}"
    assert {"biofx.passes", "biofx.select", "biofx.rewriting"} <= set(pages)
    assert "biofx.integrations.lightning.Plasticity" in pages["biofx.integrations"]
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


def test_every_figure_is_drawn_and_shown(site: Path) -> None:
    names = re.findall(r"<!-- figure: (\w+) -->", (TOOL / "pages" / "figures.md").read_text(encoding="utf-8"))
    assert len(names) == len(set(names)) >= 6
    drawn = {path.stem for path in (site / ".stage" / "figures").glob("*.svg")}
    assert set(names) == drawn
    page = (site / "figures.html").read_text(encoding="utf-8")
    for name in names:
        picture = site / "_images" / f"{name}.svg"
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
        assert f"_images/{name}.svg" in page


def test_a_name_in_inline_code_leads_to_the_reference(site: Path) -> None:
    for page in (TOOL / "pages").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        built = (site / page.relative_to(TOOL / "pages")).with_suffix(".html").read_text(encoding="utf-8")
        for name in set(re.findall(r"(?<!\[)`(\w+)`", text)) & set(config_options()):
            assert f"reference/options.html#biofx.BioConfig.{name}" in built, (page, name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("[a page](nowhere.md)", "wrong.md:3: the link to 'nowhere.md' leads nowhere"),
        ("<!-- figure: nothing -->", "wrong.md:3: no figure 'nothing'; there are one"),
        ("[a folder](../passes)", "wrong.md:3: the site has no page for '../passes'"),
    ],
)
def test_what_leads_nowhere_is_an_error_with_its_line(wrong: str, said: str, tmp_path: Path) -> None:
    root = tmp_path.resolve()
    (root / "pages").mkdir()
    (root / "passes").mkdir()
    (root / "pages" / "wrong.md").write_text(f"# Wrong\n\n{wrong}\n")
    stage = Stage(root / "stage", root)
    stage.add_figure("one", "<svg/>", "A  caption")
    with pytest.raises(StagingError, match=re.escape(said)):
        stage.add_pages(root / "pages")


def test_links_and_figures_become_those_of_the_site_but_not_in_code(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    for name in ("pages/howto", "tools/bench"):
        (root / name).mkdir(parents=True)
    (root / "tools" / "bench" / "README.md").write_text("# Time\n")
    (root / "LICENSE").write_text("MIT")
    links = "[a](../../tools/bench/README.md#time) [b](../../LICENSE)"
    text = f"{links}\n\n```\n[c](nowhere.md)\n```\n<!-- figure: one -->"
    (root / "pages" / "howto" / "page.md").write_text(f"# Page\n\n{text}\n")
    (root / "pages" / "index.md").write_text(
        "# Index\n\n## How\n\n- [page](howto/page.md)\n\n## Time\n\n- [t](../tools/bench/README.md)"
    )
    stage = Stage(root / "stage", root)
    stage.add_figure("one", "<svg/>", "A  `caption`")
    stage.add_pages(root / "pages")
    page = (root / "stage" / "howto" / "page.md").read_text()
    assert "[a](/measurements/bench.md#time) [b](/files/LICENSE)\n" in page
    assert "```\n[c](nowhere.md)\n```\n" in page
    assert ":alt: A caption\n:target: ../_images/one.svg\n\nA `caption`\n" in page
    assert (root / "stage" / "files" / "LICENSE").read_text() == "MIT"
    order = (root / "stage" / "index.md").read_text().split("```{toctree}")
    assert [part.split("```")[0].split() for part in order[1:]] == [
        [":hidden:", ":caption:", "How", "howto/page"],
        [":hidden:", ":caption:", "Time", "measurements/bench"],
    ]


def test_what_an_earlier_build_left_is_removed(tmp_path: Path) -> None:
    earlier = Stage(tmp_path / "stage", tmp_path)
    for name in ("kept.md", "howto/gone.md", "figures/gone.svg"):
        earlier.write(name, "text")
    stage = Stage(tmp_path / "stage", tmp_path)
    stage.write("kept.md", "text")
    assert stage.remove_the_rest() == [Path("howto/gone.md")]
    left = [path for path in (tmp_path / "stage").rglob("*") if path.is_file()]
    assert left == [tmp_path / "stage" / "kept.md"]


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', text) == [], path
        assert re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="(?:https?:)?//', text) == [], path
