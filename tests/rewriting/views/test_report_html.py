from __future__ import annotations

import base64
import dataclasses
import fnmatch
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, OptionError, Report
from biofx.errors import InputError
from biofx.graph.graph_view import GraphView, ModuleView, NodeView
from biofx.select import NodeIndex

FULL = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)


class ResidualNet(nn.Module):
    """Two convolutions with a way around the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.conv(x))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """Calls one layer twice, and has names that read like selectors, markup and formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc_1 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(12))
        self.Größe = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc_1(self.fc(torch.relu(self.fc(x)))))
        for block in self.blocks:
            x = block(x)
        return self.Größe(x)  # type: ignore[no-any-return]


HOSTILE = "<script>globalThis['gone']=1</script>"


def hostile_model() -> nn.Module:
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Linear(2, 4))
    model.add_module("</script><img src=x onerror=globalThis['gone']=1>", nn.ReLU())
    model.add_module("'`@data@&u003c", nn.Linear(4, 2))
    return model


def report_of(model: nn.Module, config: BioConfig = FULL) -> Report:
    return biofx.transform(model, config).report


class Page(HTMLParser):
    """What a browser would make of the page: its elements, and the texts of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._inside, []).append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


# the page as text


def test_equal_reports_give_equal_pages_and_the_file_holds_the_page(
    residual_net: nn.Module, tmp_path: Path
) -> None:
    report = report_of(residual_net)
    page = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page == report.to_html()
    again = report_of(residual_net)
    same_times = tuple(
        dataclasses.replace(entry, seconds=told.seconds)
        for entry, told in zip(again.passes, report.passes, strict=True)
    )
    assert dataclasses.replace(again, passes=same_times).to_html() == page


def test_the_page_refers_to_nothing_outside_itself(residual_net: nn.Module) -> None:
    page = Page(report_of(residual_net).to_html())
    for tag, attributes in page.elements:
        assert not {"src", "href", "action", "data", "srcset"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert tag not in ("link", "iframe", "object", "img", "base", "form")
    assert not re.search(r"url\(|@import", "".join(page.texts["style"]))


def test_the_policy_lets_run_the_pages_own_script_and_style_alone(residual_net: nn.Module) -> None:
    page = Page(report_of(residual_net).to_html())
    (policy,) = [str(a["content"]) for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none';")
    (style,) = page.texts["style"]
    data, script = page.texts["script"]
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert "unsafe" not in policy
    assert json.loads(data)["names"]


def test_names_from_the_model_are_no_markup() -> None:
    report = report_of(hostile_model())
    page = Page(report.to_html())
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert "img" not in [tag for tag, _ in page.elements]
    data = json.loads(page.texts["script"][0])
    paths = [path for path, *_ in data["graphs"]["before"]["modules"]]
    assert paths == ["", *(name for name, _ in hostile_model().named_children())]
    assert not set("<>&") & set(page.texts["script"][0])
    assert sum(tag == "title" for tag, _ in page.elements) == 1  # a name is no slot of the page
    assert page.texts["title"] == ["Sequential: what biofx did"]


def test_names_that_no_model_may_have_are_no_markup_either() -> None:
    # capture refuses quotation marks and control characters; what is put together by hand may hold them
    report = report_of(nn.Sequential(nn.Linear(2, 2)))
    assert report.before is not None
    name = "\"><img src=x onerror='1'>\\\u2028@style@"
    modules = {**report.before.modules, name: ModuleView((name,), 1)}
    nodes = (*report.before.nodes, NodeView(name, "placeholder", name, name, (), ((name, 0),)))
    odd = dataclasses.replace(report, model=name, before=GraphView(nodes, modules))
    page = Page(odd.to_html())
    assert "img" not in [tag for tag, _ in page.elements]
    assert page.texts["title"] == [f"{name}: what biofx did"]
    data = json.loads(page.texts["script"][0])
    assert name in [path for path, *_ in data["graphs"]["before"]["modules"]]
    assert name in data["names"]
    assert page.texts["script"][0].isascii()


def test_a_report_without_graphs_and_a_file_that_cannot_be_written_are_refused(
    mlp: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="this one holds none"):
        Report("Net", (), ()).to_html()
    with pytest.raises(OptionError, match="cannot write"):
        report_of(mlp).to_html(tmp_path / "no" / "such.html")


def test_numbers_behind_remarks_that_json_does_not_know_are_shown_as_text(mlp: nn.Module) -> None:
    report = report_of(mlp)
    first = report.passes[0]
    remarks = (dataclasses.replace(first.remarks[0], details={"norm": torch.inf, "dtype": torch.float16}),)
    odd = dataclasses.replace(report, passes=(dataclasses.replace(first, remarks=remarks),))
    data = json.loads(Page(odd.to_html()).texts["script"][0])
    assert data["passes"][0]["remarks"][0][4] == {"norm": "inf", "dtype": "torch.float16"}


# the page in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    service = pytest.importorskip("selenium.webdriver.chrome.service")
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-dev-shm-usage", "--window-size=1400,900"),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=service.Service(CHROMEDRIVER))
    yield driver
    driver.quit()


class Opened:
    """A report's page in the browser."""

    def __init__(self, browser: Any, report: Report, folder: Path) -> None:
        report.to_html(folder / "report.html")
        browser.get((folder / "report.html").as_uri())
        self.browser = browser

    def run(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).innerText", selector))

    def search(self, text: str) -> str:
        field = self.browser.find_element("id", "search")
        field.clear()
        field.send_keys(text + "\ue007")  # Enter searches at once
        return self.text("#found")

    def hits(self, side: str) -> set[str]:
        found = self.run(
            "return [...document.querySelectorAll(`#${arguments[0]} .node.hit .name`)]"
            ".map(e => e.textContent)",
            side,
        )
        return set(found)

    def visible_nodes(self, side: str) -> int:
        return int(
            self.run("return document.querySelectorAll(`#${arguments[0]} .node:not(.hidden)`).length", side)
        )

    def complaints(self) -> list[Any]:
        return list(self.browser.get_log("browser"))


def test_the_page_shows_both_graphs_coverage_and_times(browser: Any, tmp_path: Path) -> None:
    bio, report = biofx.transform(ResidualNet(), FULL)
    page = Opened(browser, report, tmp_path)
    assert report.before is not None
    assert page.visible_nodes("before") == len(report.before.nodes)
    assert page.visible_nodes("after") == len(bio.graph.nodes)
    for number, entry in enumerate(report.passes):
        card = page.run("return document.querySelectorAll('.card')[arguments[0]].innerText", number)
        assert entry.name in card
        assert f"{entry.seconds * 1e3:.1f} ms" in card
        assert f"{entry.applied} applied, {entry.missed} left alone" in card
    overview = page.text("#details")
    assert "3 of 3 layers" in overview
    assert "it is an output layer: no weights between it and the model's output" in overview
    created = page.run("return document.querySelectorAll('#after .node.created').length")
    assert created == sum(change.kind == "created" for change in report.changes)
    boxes = page.run(
        "return [...document.querySelectorAll('#after .node .box')].slice(0, 4).map("
        "e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height] })"
    )
    assert all(width > 50 and height > 10 for *_, width, height in boxes)
    assert len({tuple(box) for box in boxes}) == 4
    assert page.complaints() == []


class Deciding(nn.Module):
    """Keeps its forward in Python: a value decides."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_what_stays_in_python_is_listed_with_its_reason(browser: Any, tmp_path: Path) -> None:
    report = report_of(nn.Sequential(nn.Linear(4, 4), Deciding()))
    assert report.coverage is not None
    ((path, reason),) = report.coverage.kept.items()
    page = Opened(browser, report, tmp_path)
    assert page.text("#kept").split(maxsplit=1) == [path, reason]
    assert str(report.coverage) in page.text("#details")
    assert page.complaints() == []
    without = Opened(browser, report_of(ResidualNet()), tmp_path)
    assert without.run("return document.getElementById('kept')") is None


def test_a_click_on_a_node_shows_its_remark_and_on_a_module_those_inside(
    browser: Any, tmp_path: Path
) -> None:
    report = report_of(ResidualNet())
    page = Opened(browser, report, tmp_path)
    messages = [remark.message for remark in report.remarks if remark.node == "conv"]
    assert not any(message in page.text("#details") for message in messages)
    nodes = browser.find_elements("css selector", "#after .node")
    (conv,) = [node for node in nodes if node.find_element("css selector", ".name").text == "conv"]
    conv.click()
    shown = page.text("#details")
    assert len(messages) == len(report.passes) == 4
    assert all(message in shown for message in messages)
    assert "conv = self.conv(relu)  # Conv2d" in shown
    assert "conv = conv2d(relu, conv_folded, padding=(1, 1))" in shown
    page.run("biofx.choose('conv_scaled')")
    assert "created by scale-gradients" in page.text("#details")
    assert "because of conv" in page.text("#details")
    browser.find_element("id", "overview").click()
    assert "coverage" in page.text("#details")
    browser.find_element("css selector", "[data-path='stem']").click()
    shown = page.text("#details")
    assert all(remark.message in shown for remark in report.remarks if remark.layer == "stem")
    assert page.complaints() == []


def test_search_filters_by_selector_and_falls_back_to_a_part_of_the_name(
    browser: Any, tmp_path: Path
) -> None:
    bio, report = biofx.transform(ResidualNet(), FULL)
    page = Opened(browser, report, tmp_path)
    assert page.search("relu*").startswith("2 nodes before, 3 after")
    assert page.hits("before") == {"relu", "relu_1"}
    assert page.hits("after") == {"relu", "relu_1", "relu_1_checked"}
    page.search("type:Conv2d")
    assert page.hits("before") == {"stem", "conv"}
    assert page.hits("after") == {n.name for n in bio.graph.nodes if n.name.startswith(("stem", "conv"))}
    assert "by part of the name" in page.search("rel")
    assert page.hits("before") == {"relu", "relu_1"}
    assert "cannot read that" in page.search("re:(")
    assert page.hits("before") == set()
    page.search("")
    assert page.text("#found") == ""
    assert page.run("return document.querySelector('.searching')") is None
    assert page.complaints() == []


# fmt: off
PATTERNS = [
    "fc", "fc_1", "fc_2", "fc#0", "fc#1", "fc#2", "fc#x", "fc_1#0", "blocks", "blocks.1", "blocks.1.0",
    "relu", "fc*", "*", "?", "blocks.*", "blocks.?", "blocks.1?", "blocks.[0-2]", "blocks.[!0-2]",
    "*.0", "[f-c]c", "[!f-c]c", "blocks.1[0", "*[]]", "*[^x]*", "*.weight", "*_weight", "blocks*1*",
    "Gr*e", "Gr??e", "g*", "type:Linear", "type:torch.nn.modules.linear.Linear", "type:Module",
    "type:object", "type:Twice", "type:ReLU", "type:linear", "type:BioModule", "re:fc", "re:fc.*",
    r"re:blocks\.\d+", r"re:blocks\.\d\.0", r"re:\w+", "re:(fc|relu)_?1?", "re:(?P<a>b)locks.*",
    "re:(?i)FC.*", "re:blocks.[^0-9]*", "re:[]x]*", "re:", r"re:blocks\.1{2}(\..*)?", "re:fc{,2}",
    "re:{", r"re:.*\Z", r"re:\Afc", "re:Gr[^s]*e", "spare", "spar?", "nothing", "output", "x",
    "fc_weight", "spare.bio_mod", "", "#1", "blocks.1#0", "blocks.0.1#0", "a-b", r"re:fc[\w-]*",
]
# fmt: on


def test_the_pages_selectors_pick_what_those_of_the_library_pick(browser: Any, tmp_path: Path) -> None:
    model = Twice()
    bio, report = biofx.transform(model, FULL)
    page = Opened(browser, report, tmp_path)
    picked = 0
    for side, graph_module in (("before", biofx.capture(model)), ("after", bio)):
        index = NodeIndex(graph_module)
        for pattern in PATTERNS:
            found = page.run("return biofx.select(arguments[0], arguments[1])", pattern, side)
            try:
                match = index.match(pattern)
            except biofx.errors.SelectorError:
                wanted: tuple[set[str], set[str]] = (set(), set())
            else:
                wanted = ({node.name for node in match.nodes}, set(match.paths))
                picked += 1
            assert (set(found["nodes"]), set(found["paths"])) == wanted, (pattern, side)
    assert picked > 80
    assert page.complaints() == []


def test_the_pages_globs_are_those_of_fnmatch(browser: Any, tmp_path: Path) -> None:
    names = ["a", "ab", "a-b", "a]b", "a[b", "a^b", "a!b", "b", "é", "a_b", "a\\b", "𝔸", "-", "]", "ab1"]
    report = report_of(nn.Sequential(nn.Linear(2, 2)))
    assert report.before is not None
    # put together by hand: capture refuses a backslash in a name
    modules = {"": report.before.modules[""], **{name: ModuleView(("Linear",), 6) for name in names}}
    page = Opened(browser, dataclasses.replace(report, before=GraphView((), modules)), tmp_path)
    for pattern in (
        "a*",
        "a[]-]b",
        "a[!]]b",
        "a[^x]b",
        "[a-]",
        "[-a]",
        "?",
        "a[[]b",
        "[!a-z]",
        "a[\\]b",
        "a?b",
    ):
        found = page.run("return biofx.select(arguments[0], 'before')", pattern)["paths"]
        assert set(found) == {name for name in names if fnmatch.fnmatchcase(name, pattern)}, pattern


def test_a_regular_expression_that_a_browser_cannot_run_faithfully_is_refused(
    browser: Any, tmp_path: Path
) -> None:
    page = Opened(browser, report_of(ResidualNet()), tmp_path)
    for pattern in ("re:(?x) fc", r"re:\N{DIGIT ONE}", "re:(fc"):
        assert "cannot read that" in page.search(pattern)
        assert page.hits("after") == set()


def test_markup_in_names_does_nothing(browser: Any, tmp_path: Path) -> None:
    report = report_of(hostile_model())
    page = Opened(browser, report, tmp_path)
    assert browser.title == "Sequential: what biofx did"
    assert page.run("return document.querySelectorAll('main script, img').length") == 0
    for node in report.before.nodes if report.before else ():
        page.run("biofx.choose(arguments[0])", node.name)
    page.run("document.querySelectorAll('#tree .open').forEach(e => e.click())")
    browser.find_element("css selector", f'[data-path="{HOSTILE}"]').click()
    assert page.text("#details h2") == HOSTILE
    page.search(HOSTILE)
    assert page.hits("before")
    assert page.run("return globalThis.gone") is None
    assert page.run("return document.querySelectorAll('main script, img').length") == 0
    assert page.complaints() == []


def test_modules_fold_in_the_tree_and_in_the_pictures(browser: Any, tmp_path: Path) -> None:
    page = Opened(browser, report_of(Twice()), tmp_path)
    before = page.visible_nodes("before")
    rows = "return document.querySelector('#tree details details').open"
    is_open = page.run(rows)
    page.run("document.querySelector('#tree details details > summary').click()")
    assert page.run(rows) is not is_open
    page.run("document.querySelector(\".fold[title^='fold blocks in']\").click()")
    assert page.visible_nodes("before") == before - 24
    groups = "return [...document.querySelectorAll('#before .group .what')].map(e => e.textContent)"
    # every linear layer is lowered, and every relu behind one takes the pooled units
    assert page.run(groups) == ["24 nodes, 24 touched"]
    page.run("biofx.choose('blocks_3_0')")  # shows what it chooses
    assert page.visible_nodes("before") == before
    assert page.complaints() == []


def test_each_side_can_be_shown_alone_and_passes_switched_off(browser: Any, tmp_path: Path) -> None:
    page = Opened(browser, report_of(ResidualNet()), tmp_path)
    browser.find_element("css selector", "[data-side='after']").click()
    assert not browser.find_element("id", "before").is_displayed()
    assert browser.find_element("id", "after").is_displayed()
    browser.find_element("css selector", "[data-side='both']").click()
    assert browser.find_element("id", "before").is_displayed()
    page.run("document.querySelectorAll('.card').forEach(card => card.click())")
    assert page.run("return document.querySelectorAll('#after .node.off').length") == page.run(
        "return document.querySelectorAll('#after .node.changed, #after .node.considered').length"
    )


class Deep(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_graph_of_two_thousand_nodes_starts_folded_and_unfolds(browser: Any, tmp_path: Path) -> None:
    report = report_of(Deep(140))
    assert report.after is not None
    assert len(report.after.nodes) > 2000
    page = Opened(browser, report, tmp_path)
    assert (
        page.visible_nodes("after") + page.run("return document.querySelectorAll('#after .group').length")
        < 300
    )
    page.run("const s = document.getElementById('fold'); s.value = '0'; s.dispatchEvent(new Event('change'))")
    assert page.visible_nodes("after") == len(report.after.nodes)
    assert page.search("blocks.7.*").startswith("3 nodes before")
    assert page.complaints() == []


def test_a_report_in_which_nothing_changed_is_a_page_too(browser: Any, tmp_path: Path) -> None:
    off = BioConfig(fuzzy_learning_rate_factor_nu=0)
    page = Opened(browser, report_of(ResidualNet(), off), tmp_path)
    assert "No pass ran" in page.text("#details")
    assert page.visible_nodes("before") == page.visible_nodes("after") > 0
    assert page.complaints() == []
