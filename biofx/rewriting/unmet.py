"""What was asked of a pass and is not there: a mechanism that reached nothing, or not what was named for it.

What a pass leaves alone by default (the model's inputs and its readout have no signs) is not asked for, as
long as it reached something else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from biofx.select import Match

if TYPE_CHECKING:
    from biofx.rewriting.report import Remark

_IDLE = frozenset({"seed", "signs", "excitatory_fraction"})
"""Options that speak of a layer's units or of a draw, and do not ask for the mechanism in the layer."""
_DONE = "already"
_QUOTED = re.compile(r"'[^']*'")
_SHOWN = 3


@dataclass(frozen=True)
class Unmet:
    """One thing that was asked for and is not there."""

    mechanism: str
    """What was asked for, e.g. ``"signs"``."""
    layer: str
    """Path of the layer that was named for it; empty where it is all of them."""
    considered: int
    """Layers that it could have reached, a count."""
    message: str
    """How far it got, and why not further."""

    def __str__(self) -> str:
        return f"{self.mechanism} - {self.message}"


def unmet_by(
    mechanism: str,
    remarks: Iterable[Remark],
    overrides: Iterable[tuple[Iterable[Match], Mapping[str, Any]]],
) -> tuple[Unmet, ...]:
    """Return what a pass was asked for and did not do.

    Args:
        mechanism: what the pass brings; empty for one that promises nothing.
        remarks: what it said of its candidates.
        overrides: what its overrides pick, and the options they give.
    """
    said = list(remarks)
    if not mechanism:
        return ()
    if not any(map(_is_there, said)):
        meant = [remark for remark in said if not _is_switched_off(remark)]
        layers = {remark.layer for remark in meant}
        message = f"0 of {_count(layers)} ({_reasons(meant) or 'the model has none that it acts on'})"
        return (Unmet(mechanism, "", max(1, len(layers)), message),)
    return tuple(dict.fromkeys((*_ends(mechanism, said), *_named(mechanism, said, overrides))))


def _ends(mechanism: str, remarks: list[Remark]) -> Iterator[Unmet]:
    """Yield the free ends of the model that an option asks for."""
    for remark in remarks:
        end = remark.details.get("asked_as")
        if remark.kind == "missed" and end is not None and not _is_there(remark):
            yield Unmet(mechanism, remark.layer, 1, f"not at {end} {remark.layer!r} ({remark.message})")


def _named(
    mechanism: str,
    remarks: list[Remark],
    overrides: Iterable[tuple[Iterable[Match], Mapping[str, Any]]],
) -> Iterator[Unmet]:
    """Yield the selectors of overrides that pick nothing which the mechanism reached."""
    for matches, options in overrides:
        if set(options) <= _IDLE or options.get("enabled") is False:
            continue
        for match in matches:
            names = {node.name for node in match.nodes}
            picked = [r for r in remarks if r.node in names or r.layer in match.paths]
            meant = [remark for remark in picked if not _is_switched_off(remark)]
            if any(map(_is_there, meant)) or (picked and not meant):
                continue
            layers = {remark.layer for remark in meant}
            shown = match.pattern if isinstance(match.pattern, str) else "a predicate"
            message = f"0 of {_count(layers)} that {shown!r} names ({_reasons(meant)})"
            yield Unmet(mechanism, min(layers, default=""), max(1, len(layers)), message)


def _is_there(remark: Remark) -> bool:
    """Whether the mechanism acts on a candidate, from now on or from an earlier transform."""
    return remark.kind == "applied" or remark.message.endswith(_DONE)


def _is_switched_off(remark: Remark) -> bool:
    off = ("switched off here", "gamma=0 is off", "gamma=1 is off", "not selected", "excluded")
    return remark.kind == "missed" and any(words in remark.message for words in off)


def _reasons(remarks: list[Remark]) -> str:
    """Return why candidates were left alone, the commonest reasons first."""
    first: dict[str, str] = {}
    counts = Counter(_QUOTED.sub("", remark.message) for remark in remarks)
    for remark in remarks:
        first.setdefault(_QUOTED.sub("", remark.message), remark.message)
    told = [
        f"{count} times: {first[key]}" if count > 1 else first[key]
        for key, count in counts.most_common(_SHOWN)
    ]
    more = len(counts) - _SHOWN
    return "; ".join(told) + (f"; and {more} more reasons" if more > 0 else "")


def _count(layers: set[str]) -> str:
    return "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
