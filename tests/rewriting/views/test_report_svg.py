from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, OptionError, Report, passes
from biofx.errors import InputError
from biofx.graph.changes import Change
from biofx.graph.graph_view import GraphView, NodeView
from biofx.rewriting.remarks import PassReport, Remark
from biofx.rewriting.views.drawing import PALETTE
from biofx.rewriting.views.pictures import escaped, shortened
from biofx.rewriting.views.terminal import STYLES

FULL = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)
SVG = "{http://www.w3.org/2000/svg}"


def parsed(picture: str) -> Any:
    return ElementTree.fromstring(picture)


def texts(picture: str, kind: str) -> list[str]:
    return [str(e.text) for e in parsed(picture).iter(f"{SVG}text") if e.get("class") == kind]


def test_the_picture_of_a_small_report(golden: Callable[[str, str], None]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    report = biofx.transform(model, passes="split-weights").report
    golden("test_report_svg", report.to_svg().replace("><", ">\n<"))


@pytest.mark.parametrize("side", ["before", "after", "both"])
def test_a_picture_has_a_box_for_each_node_and_a_line_for_each_edge(
    residual_net: nn.Module, side: Any, tmp_path: Path
) -> None:
    report = biofx.transform(residual_net, FULL).report
    picture = report.to_svg(tmp_path / "graph.svg", graph=side)
    assert (tmp_path / "graph.svg").read_text(encoding="utf-8") == picture == report.to_svg(graph=side)
    view = report.before if side == "before" else report.after
    assert view is not None
    root = parsed(picture)
    assert len(texts(picture, "name")) == len(view.nodes)
    edges = [e for e in root.iter(f"{SVG}path") if str(e.get("class")).startswith("edge")]
    assert len(edges) == sum(len(node.inputs) for node in view.nodes)
    width, height = float(root.get("width")), float(root.get("height"))
    assert 300 < width < 3000
    assert 300 < height < 3000


def test_boxes_are_coloured_by_the_pass_and_say_why(residual_net: nn.Module) -> None:
    report = biofx.transform(residual_net, FULL).report
    root = parsed(report.to_svg())
    groups = {g.find(f"{SVG}text").text: g for g in root.iter(f"{SVG}g") if "node" in g.get("class", "")}
    stem = groups["stem"]
    assert stem.get("class") == "node changed rewired t3"
    bars = [bar.get("class") for bar in stem.iter(f"{SVG}rect")]
    assert bars == ["box", "bar p0", "bar p1", "bar p2", "bar p3"]
    title = stem.find(f"{SVG}title").text
    assert all(remark.message in title for remark in report.remarks if remark.node == "stem")
    assert groups["x"].get("class") == "node"
    style = root.find(f"{SVG}style").text
    assert all(color in style for color in PALETTE)
    legend = "".join(str(text.text) for text in root.iter(f"{SVG}text"))
    assert all(f"{entry.applied} applied, {entry.missed} left alone" in legend for entry in report.passes)


def test_markup_and_characters_that_xml_does_not_have_are_replaced() -> None:
    assert escaped("<a>&\"'\x00\ud800") == "&lt;a&gt;&amp;&quot;&#x27;\ufffd\ufffd"
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>&", nn.Linear(2, 2))
    report = biofx.transform(model).report
    assert not list(parsed(report.to_svg()).iter(f"{SVG}script"))
    assert "<script>" in "".join(str(title.text) for title in parsed(report.to_svg()).iter(f"{SVG}title"))
    # capture refuses names with control characters; what is put together by hand may hold them
    line = "</title><script>\"'\x07"
    view = GraphView((NodeView("x", "placeholder", "\x07<script>", line, (), ()),), {})
    (box,) = [
        e
        for e in parsed(Report("<&\x00", (), (), view, view).to_svg()).iter(f"{SVG}g")
        if "node" in e.get("class", "")
    ]
    assert box.find(f"{SVG}title").text == "</title><script>\"'\ufffd"


def test_a_long_name_loses_its_middle() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcde…hijk"


def test_what_cannot_be_drawn_is_refused(mlp: nn.Module) -> None:
    with pytest.raises(InputError, match="holds none"):
        Report("Net", (), ()).to_svg()
    side: Any = "behind"
    with pytest.raises(OptionError, match="expected one of 'before', 'after', 'both', found 'behind'"):
        biofx.transform(mlp).report.to_svg(graph=side)


def test_every_pass_of_biofx_has_a_colour_of_its_own_in_the_legend(mlp: nn.Module) -> None:
    own = [getattr(passes, name).name for name in passes.__all__]
    report = biofx.transform(mlp, passes=",".join(own)).report
    assert sorted(entry.name for entry in report.passes) == sorted(own)
    (legend,) = [g for g in parsed(report.to_svg()).iter(f"{SVG}g") if g.get("class") == "legend"]
    squares = [str(square.get("class")) for square in legend.iter(f"{SVG}rect")]
    assert squares == [f"p{number}" for number in range(len(own))]
    told = [str(text.text) for text in legend.iter(f"{SVG}text")][1:]
    assert all(text.startswith(entry.text) for text, entry in zip(told, report.passes, strict=True))
    assert len(set(PALETTE)) == len(PALETTE) >= len(own)
    assert len(set(STYLES)) == len(STYLES) >= len(own)  # those of the tree in a terminal


def test_more_passes_than_colours_start_again(mlp: nn.Module) -> None:
    report = biofx.transform(mlp, passes=["scale-gradients"]).report
    many = tuple(
        PassReport(
            f"p{n}", f"p{n}", (Remark("applied", "_0", "0", "done"),), (Change("rewired", "_0", "a", "b"),)
        )
        for n in range(len(PALETTE) + 1)
    )
    picture = Report("Net", many, (), report.before, report.after).to_svg()
    assert 'class="node changed rewired t0"' in picture


class Erased(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def test_what_a_pass_erased_is_in_the_picture_of_both(mlp: nn.Module) -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True, kw_only=True)
    class Drop(biofx.Pass):
        """Take every relu out."""

        name: ClassVar[str] = "drop"

        def rewrite(self, graph_module: biofx.BioGraphModule, scope: biofx.Scope) -> Any:
            for node in graph_module.graph.find_nodes(op="call_function", target=torch.relu):
                yield biofx.applied(node, "", "taken out")
                node.replace_all_uses_with(node.args[0])

    report = biofx.transform(Erased(), passes=Drop()).report
    assert texts(report.to_svg(), "name") == ["x", "output"]
    assert texts(report.to_svg(graph="both"), "name") == ["x", "relu", "output"]
    assert "erased" in report.to_svg(graph="both")
    assert texts(report.to_svg(graph="before"), "mark") == ["−", "~"]
