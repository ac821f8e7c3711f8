from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import biofx
from biofx import BioConfig, Report
from biofx.errors import InputError
from biofx.rewriting.views.terminal import ModelTree

FULL = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(12))
        self.spare = nn.Linear(2, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(torch.relu(self.stem(x))))
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def shown(report: Report, *, width: int = 80, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width).print(ModelTree(report))
    file.seek(0)
    return file.read()


def without_times(text: str) -> str:
    head, line, table = text.partition("\npass ")
    return head + line + "\n".join(row.rpartition("  ")[0].rstrip() for row in table.splitlines())


@pytest.mark.parametrize("name", ["deep", "residualnet"])
def test_the_tree_at_80_columns(
    name: str, residual_net: nn.Module, golden: Callable[[str, str], None]
) -> None:
    torch.manual_seed(0)
    text = shown(biofx.transform(Deep() if name == "deep" else residual_net, FULL).report)
    assert max(map(len, text.splitlines())) <= 80
    golden(f"test_model_tree_{name}", without_times(text))


def test_every_remark_of_a_shallow_model_is_there_word_for_word(residual_net: nn.Module) -> None:
    report = biofx.transform(residual_net, FULL).report
    text = shown(report, width=300)
    for entry in report.passes:
        for remark in entry.remarks:
            mark = "✓" if remark.kind == "applied" else "·"
            assert f"{mark} {entry.name}: {remark.message}" in text


def test_blocks_that_differ_in_numbers_are_told_as_one_with_their_range() -> None:
    report = biofx.transform(Deep()).report
    text = shown(report, width=200)
    means = [
        remark.message.split("mean ")[1].split(",")[0]
        for remark in report.remarks
        if "blocks" in remark.layer
    ]
    assert "0 to 11  Sequential, 12 alike" in text
    assert f"mean {min(means)}–{max(means)}" in text
    assert text.count("blocks") == 1


def test_blocks_that_differ_in_more_are_told_apart() -> None:
    report = biofx.transform(Deep(), FULL, exclude="blocks.4").report
    text = shown(report, width=200)
    assert "0 to 3  Sequential, 4 alike" in text
    # the fold has nothing to sum among the inputs of block 5
    assert "6 to 11  Sequential, 6 alike" in text
    assert text.count("excluded by 'blocks.4'") == len(report.passes) == 4


def test_without_unicode_and_without_colour_it_reads_the_same() -> None:
    report = biofx.transform(Deep(), FULL).report
    plain = shown(report, encoding="ascii")
    assert "0 to 11  Sequential, 12 alike" in plain
    assert "+ scale-gradients: 16 factors" in plain.replace("\n", " ")
    assert "|-- " in plain or "+-- " in plain
    assert "\x1b" not in shown(report)


def test_markup_in_names_is_printed_as_it_is() -> None:
    model = nn.Sequential()
    model.add_module("[red]x[/red]", nn.Linear(2, 2))
    assert "[red]x[/red]" in shown(biofx.transform(model).report)


def test_a_model_of_one_layer_and_a_report_without_graphs() -> None:
    text = shown(biofx.transform(nn.Linear(3, 2)).report)
    assert "scale-gradients: 6 factors" in text
    with pytest.raises(InputError, match="holds none"):
        shown(Report("Net", (), ()))
