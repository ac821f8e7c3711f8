"""The table, measured and held against the README's."""

from __future__ import annotations

from pathlib import Path

import torch
from contenders import Biofx, ByHand, contenders
from rich.console import Console
from rich.table import Table
from rows import ROWS, measure


def told_in(readme: str) -> dict[str, dict[str, str]]:
    """Return the README's table: for each row the entry of each contender, by its name."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in readme.splitlines()
        if line.startswith("|")
    ]
    heading = next(cells for cells in lines if Biofx.name in cells and ByHand.name in cells)
    return {cells[0]: dict(zip(heading[1:], cells[1:], strict=True)) for cells in lines if cells[0] in ROWS}


def main() -> int:
    """Print the table, and return whether an entry of the README differs from it."""
    torch.set_num_threads(1)
    told = told_in((Path(__file__).parent / "README.md").read_text(encoding="utf-8"))
    table, differing = Table(box=None), []
    there = contenders()
    for heading in ("", *(contender.name for contender in there)):
        table.add_column(heading)
    for row in ROWS:
        found = {contender.name: measure(contender, row) for contender in there}
        table.add_row(row, *found.values())
        differing += [
            f"{row}, {name}: the README says {told.get(row, {}).get(name)!r}, found {entry!r}"
            for name, entry in found.items()
            if told.get(row, {}).get(name) != entry
        ]
    console = Console(highlight=False)
    console.print(table)
    for line in differing:
        console.print(line, style="red", markup=False)
    return int(bool(differing))
