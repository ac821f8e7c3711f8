"""Units that are one: what hangs together by pairs, and how two analyses of one model compare."""

from __future__ import annotations

import torch
from torch import Tensor

from biofx.analysis.joined_numbers import smallest_connected
from biofx.analysis.units import UnitAnalysis

_PREFERRED = ("layer", "open", "input", "constant")
"""By which kind of source a unit is represented, of those that are one in it."""


def representatives(analysis: UnitAnalysis, *, by_columns: bool = True) -> Tensor:
    """Return for each unit the first that a layer makes, of those that are one with it, if any does.

    Args:
        analysis: of the units.
        by_columns: whether units are one, too, where nothing says so but that one weight reads both.
    """
    count, sources = analysis.count, analysis.sources
    left_out = set() if by_columns else set(map(id, analysis.same_columns))
    pairs = [pair for pair in analysis.pairs if id(pair) not in left_out]
    smallest = smallest_connected(count, torch.cat([torch.empty(2, 0, dtype=torch.int64), *pairs], 1))
    ranks = torch.tensor([_PREFERRED.index(source.kind) for source in sources], dtype=torch.int64)
    counts = torch.tensor([source.count for source in sources], dtype=torch.int64)
    numbers = ranks.repeat_interleave(counts) * count + torch.arange(count)
    best = numbers.clone().scatter_reduce(0, smallest, numbers, "amin")
    return (best % max(1, count))[smallest]


def comparable(analysis: UnitAnalysis) -> Tensor:
    """Return for each unit a number by which it compares with the units of another analysis of the model.

    Units that layers make are numbered by the path of the weight and their place there, and units that are
    one have the smallest of those numbers; those that no layer makes have -1.
    """
    numbers = torch.full((analysis.count,), -1)
    first = 0
    for path in sorted(analysis.produced):
        units = analysis.produced[path].labels.flatten()
        numbers[units] = first + torch.arange(len(units))
        first += len(units)
    none = torch.empty(2, 0, dtype=torch.int64)
    smallest = smallest_connected(analysis.count, torch.cat([none, *analysis.pairs], 1))
    best = torch.full((analysis.count,), first).scatter_reduce(
        0, smallest, torch.where(numbers < 0, first, numbers), "amin"
    )
    found = best[smallest]
    return torch.where(found == first, -1, found)
