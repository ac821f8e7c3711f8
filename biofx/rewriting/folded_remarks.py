"""Remarks that say the same, as one: calls of a layer, and layers that are left alone for one reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from biofx.rewriting.remarks import Remark

_FEWEST_ALIKE = 4
"""Fewer layers take little room, each with a line of its own."""
_SHOWN = 3


@dataclass(frozen=True)
class FoldedRemarks:
    """Remarks of one pass with one message."""

    remarks: tuple[Remark, ...]

    @property
    def kind(self) -> str:
        """Whether it was done or not, as of each remark."""
        return self.remarks[0].kind

    @property
    def message(self) -> str:
        """What all of them say."""
        return self.remarks[0].message

    @property
    def subject(self) -> str:
        """The candidates for a reader: the first layers, or the calls of one, and how many more."""
        layers = list(dict.fromkeys(remark.layer or remark.subject for remark in self.remarks))
        if len(self.remarks) == 1:
            return self.remarks[0].subject
        if len(layers) == 1:
            return f"{_first([remark.node or layers[0] for remark in self.remarks])} ({layers[0]})"
        return _first(layers)

    def __str__(self) -> str:
        return f"{self.kind:<7} {self.subject}: {self.message}"


def _first(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def fold_remarks(remarks: Iterable[Remark]) -> Iterator[FoldedRemarks]:
    """Yield remarks in order, those that say the same where the first of them is."""
    groups: dict[tuple[str, str], list[Remark]] = {}
    ordered = list(remarks)
    for remark in ordered:
        groups.setdefault((remark.kind, remark.message), []).append(remark)
    told: set[tuple[str, str, str]] = set()
    for remark in ordered:
        alike = groups[remark.kind, remark.message]
        calls = [other for other in alike if other.layer == remark.layer]
        is_folded = len({other.layer for other in alike}) >= _FEWEST_ALIKE
        key = (remark.kind, remark.message, "" if is_folded else remark.layer or str(remark.node))
        if key not in told:
            told.add(key)
            yield FoldedRemarks(tuple(alike if is_folded else calls if remark.layer else [remark]))
