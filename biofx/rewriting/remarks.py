"""What passes say: a remark for each candidate, and the records that are made of remarks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch.fx import Node

from biofx.errors import InputError
from biofx.graph.changes import Change
from biofx.graph.graph_view import GraphView
from biofx.rewriting.model_coverage import ModelCoverage, PassCoverage
from biofx.select import Match


@dataclass(frozen=True)
class Remark:
    """What a pass did with one candidate, or why it left it alone."""

    kind: Literal["applied", "missed"]
    node: str | None
    """Name of the candidate node; None for a layer that the graph never calls."""
    layer: str
    """Path of the candidate's layer, empty for the model itself."""
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)
    """The numbers behind the message."""
    reason: Literal["", "done", "off", "exempt"] = ""
    """Why a candidate is left alone, if that counts: ``"done"``, the mechanism acts on it from an earlier
    transform; ``"off"``, it is not selected, or switched off; ``"exempt"``, the mechanism is not for it."""
    note: str = field(default="", compare=False)
    """The end of the message, if it says something else than why or what: a consequence of other rewrites."""

    @property
    def is_in_force(self) -> bool:
        """Whether the mechanism acts on the candidate, from now on or from an earlier transform."""
        return self.kind == "applied" or self.reason == "done"

    @property
    def own_message(self) -> str:
        """The message without the note, by which remarks are counted together."""
        return self.message.removesuffix(f"; {self.note}") if self.note else self.message

    def with_note(self, note: str) -> Remark:
        """Return the remark with something said at its end."""
        return replace(self, message=f"{self.message}; {note}", note=note) if note else self

    @property
    def subject(self) -> str:
        """The candidate for a reader: its layer, and its node where that has another name."""
        if self.node is None or self.layer.replace(".", "_") == self.node.removeprefix("_"):
            return self.layer
        return f"{self.node} ({self.layer})" if self.layer else self.node

    def __str__(self) -> str:
        return f"{self.kind:<7} {self.subject}: {self.message}"


class Exempt(str):
    """A reason that lies in what a mechanism is for, and not in what could not be done.

    Coverage counts what is left alone for such a reason by itself.
    """


def applied(node: Node, layer: str, message: str, **details: Any) -> Remark:
    """Return a remark on a candidate that was rewritten.

    Args:
        node: the candidate.
        layer: path of its layer, empty for the model itself.
        message: what was done.
        **details: the numbers behind the message.
    """
    return Remark("applied", node.name, layer, message, details)


def missed(node: Node | None, layer: str, message: str, **details: Any) -> Remark:
    """Return a remark on a candidate that was left alone.

    Args:
        node: the candidate; None for a layer that the graph never calls.
        layer: path of its layer, empty for the model itself.
        message: why it was left alone; an :class:`Exempt` text where the mechanism is not for it.
        **details: the numbers behind the message.
    """
    reason: Literal["", "exempt"] = "exempt" if isinstance(message, Exempt) else ""
    return Remark("missed", None if node is None else node.name, layer, str(message), details, reason)


def done_already(node: Node, layer: str, message: str) -> Remark:
    """Return a remark on a candidate on which an earlier transform has done what the pass does."""
    return Remark("missed", node.name, layer, message, reason="done")


def switched_off(node: Node | None, layer: str, message: str) -> Remark:
    """Return a remark on a candidate that is not selected, or whose options switch the pass off."""
    return Remark("missed", None if node is None else node.name, layer, message, reason="off")


@dataclass(frozen=True)
class Unmet:
    """Something that was asked for and is not in the model."""

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


@dataclass(frozen=True)
class PassReport:
    """What one pass did."""

    name: str
    text: str
    """The pass as pipeline text."""
    remarks: tuple[Remark, ...]
    changes: tuple[Change, ...]
    seconds: float = 0.0
    unmet: tuple[Unmet, ...] = ()
    """What was asked of it and is not in the model."""

    @property
    def applied(self) -> int:
        """How many candidates were rewritten."""
        return sum(remark.kind == "applied" for remark in self.remarks)

    @property
    def missed(self) -> int:
        """How many candidates were left alone."""
        return len(self.remarks) - self.applied

    def coverage(self, graph: GraphView) -> PassCoverage:
        """Return how much of the model the pass reached.

        Args:
            graph: the graph that went in.
        """
        rewritten = {remark.layer for remark in self.remarks if remark.kind == "applied"}
        reasons = Counter(remark.own_message for remark in self.remarks if remark.kind == "missed")
        return PassCoverage(
            layers=len(rewritten),
            candidate_layers=len({remark.layer for remark in self.remarks}),
            parameters=sum(graph.modules[path].parameters for path in rewritten if path in graph.modules),
            all_parameters=sum(module.parameters for module in graph.modules.values()),
            reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        )


@dataclass(frozen=True)
class ReportRecord:
    """What a pipeline did to a model, as plain records; :class:`biofx.Report` also shows them."""

    model: str
    """Class name of the model."""
    passes: tuple[PassReport, ...]
    changes: tuple[Change, ...]
    """The nodes that differ between the graph that went in and the graph that came out."""
    before: GraphView | None = field(default=None, compare=False, repr=False)
    """The graph that went in; None for a report that was put together by hand."""
    after: GraphView | None = field(default=None, compare=False, repr=False)
    """The graph that came out."""
    coverage: ModelCoverage | None = None
    """Every parameter: rewritten, or left alone with a reason; None in a report of graphs alone."""

    @property
    def modified(self) -> bool:
        """Whether any node differs."""
        return bool(self.changes)

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """The remarks of all passes, in order."""
        return tuple(remark for entry in self.passes for remark in entry.remarks)

    @property
    def unmet(self) -> tuple[Unmet, ...]:
        """What was asked for and is not in the model, of all passes."""
        return tuple(entry for part in self.passes for entry in part.unmet)

    def summary(self) -> str:
        """Return one line: how many nodes differ, how far each pass came, and what is missing."""
        asked = [entry for entry in self.passes if entry.remarks]
        done = ", ".join(f"{entry.name} {entry.applied} of {len(entry.remarks)}" for entry in asked)
        missed = f"; asked for and not there: {len(self.unmet)}" if self.unmet else ""
        return self._differences() + (f"; {done}" if done else "") + missed

    def _differences(self) -> str:
        if not self.passes:
            return "no pass ran: every mechanism is off"
        if not self.changes:
            return "the graph is unchanged"
        kinds = ("created", "replaced", "rewired", "erased")
        counts = {kind: sum(change.kind == kind for change in self.changes) for kind in kinds}
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) + " nodes"

    def unmet_lines(self) -> Iterator[str]:
        """Yield a line for each thing that was asked for and is not in the model, with the reason."""
        yield from (f"asked: {entry}" for entry in self.unmet)

    def kept_lines(self) -> Iterator[str]:
        """Yield lines on the modules that are not part of a graph: why, and how much that leaves."""
        if self.coverage is not None and self.coverage.kept:
            yield f"in Python: {len(self.coverage.kept)} modules keep their eager forward; {self.coverage}"
            for path, reason in self.coverage.kept.items():
                yield f"  {path or 'the model'}: {reason}"

    def graphs(self) -> tuple[GraphView, GraphView]:
        """Return the graph that went in and the graph that came out.

        Raises:
            InputError: the report was put together by hand, and holds no graphs.
        """
        if self.before is None or self.after is None:
            raise InputError(
                "expected a report with its graphs, as biofx.transform and passes return it; this one holds "
                "none"
            )
        return self.before, self.after


_IDLE = frozenset({"seed", "signs", "excitatory_fraction"})
"""Options about units or about a draw; an override with these alone does not ask for the mechanism."""
_QUOTED = re.compile(r"'[^']*'")
_SHOWN = 3


def unmet_by(
    mechanism: str,
    remarks: Iterable[Remark],
    overrides: Iterable[tuple[Iterable[Match], Mapping[str, Any]]],
) -> tuple[Unmet, ...]:
    """Return what a pass was asked for and did not do.

    What a pass leaves alone by default (the model's inputs and its readout have no signs) is not asked for,
    as long as the pass reached something else.

    Args:
        mechanism: :attr:`~biofx.Pass.mechanism`; empty for a pass that cannot be missed.
        remarks: of the pass.
        overrides: what its overrides pick, and the options they give.
    """
    said = list(remarks)
    if not mechanism:
        return ()
    if not any(remark.is_in_force for remark in said):
        meant = [remark for remark in said if remark.reason != "off"]
        layers = {remark.layer for remark in meant}
        message = f"0 of {_count(layers)} ({_reasons(meant) or 'the model has none that it acts on'})"
        return (Unmet(mechanism, "", max(1, len(layers)), message),)
    return tuple(dict.fromkeys((*_ends(mechanism, said), *_named(mechanism, said, overrides))))


def _ends(mechanism: str, remarks: list[Remark]) -> Iterator[Unmet]:
    """Yield the inputs and readouts that an option asks for."""
    for remark in remarks:
        end = remark.details.get("asked_as")
        if remark.kind == "missed" and end is not None and not remark.is_in_force:
            yield Unmet(mechanism, remark.layer, 1, f"not at {end} {remark.layer!r} ({remark.message})")


def _named(
    mechanism: str,
    remarks: list[Remark],
    overrides: Iterable[tuple[Iterable[Match], Mapping[str, Any]]],
) -> Iterator[Unmet]:
    """Yield the selectors of overrides that pick nothing that the mechanism reached."""
    for matches, options in overrides:
        if set(options) <= _IDLE or options.get("enabled") is False:
            continue
        for match in matches:
            names = {node.name for node in match.nodes}
            picked = [r for r in remarks if r.node in names or r.layer in match.paths]
            meant = [remark for remark in picked if remark.reason != "off"]
            if any(remark.is_in_force for remark in meant) or (picked and not meant):
                continue
            layers = {remark.layer for remark in meant}
            shown = match.pattern if isinstance(match.pattern, str) else "a predicate"
            message = f"0 of {_count(layers)} that {shown!r} names ({_reasons(meant)})"
            yield Unmet(mechanism, min(layers, default=""), max(1, len(layers)), message)


def _reasons(remarks: list[Remark]) -> str:
    """Return why candidates were left alone, the most frequent first."""
    first: dict[str, str] = {}
    counts = Counter(_QUOTED.sub("", remark.own_message) for remark in remarks)
    for remark in remarks:
        first.setdefault(_QUOTED.sub("", remark.own_message), remark.own_message)
    shown = [
        f"{count} times: {first[key]}" if count > 1 else first[key]
        for key, count in counts.most_common(_SHOWN)
    ]
    more = len(counts) - _SHOWN
    return "; ".join(shown) + (f"; and {more} more reasons" if more > 0 else "")


def _count(layers: set[str]) -> str:
    return "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
