"""What every pass is: a frozen record of options that rewrites a graph and says what it did."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch.fx import GraphModule, Node

from biofx.errors import BiofxError, InputError, OptionError, PassError, add_note, suggest
from biofx.foreign_errors import BY_A_PASS, foreign_errors_wrapped
from biofx.graph.analysis_cache import analyses_kept
from biofx.graph.changes import Snapshot, compare
from biofx.graph.graph_view import GraphView
from biofx.graph.node_kinds import changes_in_place
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import Sites
from biofx.model.graph_module import BioGraphModule
from biofx.model.region_parts import joined
from biofx.options import declared_options
from biofx.progress import advance
from biofx.rewriting.attribution import attributed
from biofx.rewriting.model_coverage import coverage_of
from biofx.rewriting.pass_text import format_item
from biofx.rewriting.report import PassReport, Remark, Report
from biofx.rewriting.unmet import unmet_by
from biofx.select import (
    Match,
    NodeIndex,
    Override,
    Selection,
    Selector,
    check_selector,
    picks,
    show_pattern,
)

PassT = TypeVar("PassT", bound="Pass")

BROKE_ITS_CONTRACT = "broke its contract"
"""What an error says of a pass whose fault it is."""
_EVERY_PASS = ("only", "exclude", "enabled", "overrides")


class PassResult(NamedTuple):
    """A rewritten graph and what was done to it; unpacks as ``graph_module, report``."""

    graph_module: BioGraphModule
    report: Report

    @property
    def modified(self) -> bool:
        """Whether the graph differs from the one that went in."""
        return self.report.modified


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite of a graph.

    A subclass is a frozen dataclass; its fields are its options. It sets :attr:`name`, checks its options
    in ``__post_init__`` and implements :meth:`rewrite`. Calling a pass never changes the graph module that
    it is given: it works on a copy.
    """

    name: ClassVar[str]
    """What the pass is called in a pipeline's text."""
    after: ClassVar[tuple[str, ...]] = ()
    """Names of the passes that must run earlier, where both are in a pipeline."""
    mechanism: ClassVar[str] = ""
    """What the pass brings to a model, so that a model without it is missing something; empty for nothing."""

    only: Selector | None = None
    """Rewrite only what this selects (see :mod:`biofx.select`); None is everything."""
    exclude: Selector | None = None
    """Leave alone what this selects."""
    enabled: bool = True
    """Whether the pass acts at all; an override may switch it on or off for some layers."""
    overrides: tuple[Override, ...] = ()
    """Other options for what a selector picks, in order, the last one winning."""

    def __post_init__(self) -> None:
        for name, declared in declared_options(type(self)).items():
            value = declared.permitted.check(f"{self.name}: {name}", getattr(self, name))
            object.__setattr__(self, name, value)
        for side in ("only", "exclude"):
            if getattr(self, side) is not None:
                object.__setattr__(self, side, check_selector(getattr(self, side)))
        if not isinstance(self.enabled, bool):
            raise OptionError(f"{self.name}: enabled: expected True or False, found {self.enabled!r}")
        if not isinstance(self.overrides, (list, tuple)):
            raise OptionError(
                f"{self.name}: overrides: expected a list of Override records, found {self.overrides!r}"
            )
        object.__setattr__(
            self, "overrides", tuple(self._checked_override(entry) for entry in self.overrides)
        )

    def _checked_override(self, override: Override) -> Override:
        if not isinstance(override, Override) or not override.options:
            raise OptionError(
                f"{self.name}: overrides: expected Override records with options, found {override!r}"
            )
        options = dict(override.options)
        own = [name for name in self.option_names() if name not in _EVERY_PASS or name == "enabled"]
        for name in options:
            if name not in own:
                raise OptionError(f"{self.name} has no option {name!r} to override{suggest(name, own)}")
        changed = dataclasses.replace(self, overrides=(), **options)
        checked = tuple((name, getattr(changed, name)) for name in options)
        return Override(check_selector(override.selector), checked)

    @classmethod
    def option_names(cls) -> list[str]:
        """Return the names of the options, those that every pass has at the end."""
        names = [field.name for field in dataclasses.fields(cls) if field.init]
        return sorted(names, key=lambda name: name in _EVERY_PASS)

    @classmethod
    def from_options(cls: type[PassT], options: Mapping[str, Any]) -> PassT:
        """Build the pass from a mapping of option names to values.

        Raises:
            OptionError: an unknown option (the nearest are named) or a bad value.
        """
        known = cls.option_names()
        for name in options:
            if name not in known:
                raise OptionError(f"{cls.name} has no option {name!r}{suggest(name, known)}")
        return cls(**options)

    def __str__(self) -> str:
        changed = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "overrides" and field.compare and getattr(self, field.name) != field.default
        }
        ordered = {name: changed[name] for name in self.option_names() if name in changed}
        return format_item(
            self.name, ordered, [(entry.selector, dict(entry.options)) for entry in self.overrides]
        )

    def requires(self, graph_module: GraphModule) -> None:  # noqa: B027
        """Check the graph before the pass runs.

        Raises:
            PassError: the pass cannot run on this graph.
        """

    @abstractmethod
    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Rewrite the graph in place, yielding one remark per candidate.

        ``scope.options(self, node, layer)`` gives the options that hold for a candidate, or the reason why it
        is out. Copying, dead code, linting and recompiling are the caller's business.
        """

    def ensures(self, graph_module: GraphModule) -> None:  # noqa: B027
        """Check the graph that the pass made.

        Raises:
            PassError: it is not what the pass promises.
        """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Return a rewritten copy of a graph module, and a report.

        Raises:
            InputError: it is not a graph module.
            SelectorError: a pattern matches nothing.
            PassError: the pass cannot run on this graph.
        """
        if not isinstance(graph_module, GraphModule):
            raise InputError(
                f"{self.name}: expected a torch.fx.GraphModule, found {type(graph_module).__name__}; "
                "capture the model first (biofx.capture), or use biofx.transform"
            )
        try:
            return self.on_own(BioGraphModule.copy_of(graph_module))
        except Exception as error:
            from biofx.rewriting.reproducer import note_reproducer  # which needs passes to say what was run

            note_reproducer(error, lambda: BioGraphModule.copy_of(graph_module), self)
            raise

    def on_own(
        self, graph_module: BioGraphModule, finish: Callable[[Sites], object] = lambda sites: None
    ) -> PassResult:
        """Do the same in place, on a graph module that the caller made and will not need as it was.

        ``finish`` is called in the end with what there is to weights in the rewritten graph.
        """
        with joined(graph_module), analyses_kept():
            before = Snapshot.of(graph_module.graph)
            view = GraphView.of(graph_module, before.lines)
            reports = tuple(self.run(graph_module, ()))
            after = Snapshot.of(graph_module.graph) if reports else before
            views = view, GraphView.of(graph_module, after.lines) if reports else view
            sites = find_sites(graph_module)
            coverage = coverage_of(graph_module, sites, *_fates(reports))
            finish(sites)
        because = {change.node: change.because for entry in reports for change in entry.changes}
        changes = tuple(
            dataclasses.replace(change, because=because.get(change.node)) for change in compare(before, after)
        )
        report = Report(type(graph_module).__name__, reports, changes, *views, coverage)
        return PassResult(graph_module, report)

    def run(
        self, graph_module: BioGraphModule, within: tuple[tuple[Selector | None, Selector | None], ...]
    ) -> Iterator[PassReport]:
        """Run the whole ritual in place; ``within`` holds the selections of the pipelines around the pass."""
        started = time.perf_counter()
        before = Snapshot.of(graph_module.graph)
        unused = {node for node in graph_module.graph.nodes if not node.users}
        try:
            self.requires(graph_module)
            scope = Scope(self, graph_module, (*within, (self.only, self.exclude)))
            remarks = []
            for remark in self.rewrite(graph_module, scope):
                advance(self.name)
                remarks.append(remark)
            remarks += scope.idle_selections(remarks)
            _erase_orphans(graph_module, unused)
            graph_module.graph.lint()
            graph_module.recompile()
            self.ensures(graph_module)
        except BiofxError:
            raise
        except Exception as error:
            if type(self).__module__.partition(".")[0] == __name__.partition(".")[0]:
                with foreign_errors_wrapped(PassError, f"{self.name} {BROKE_ITS_CONTRACT}: it"):
                    raise
            add_note(error, f"{BY_A_PASS}{self}, which was given this graph:\n{before.text}")
            raise
        place = {name: number for number, name in enumerate(before.lines)}
        remarks.sort(key=lambda remark: place.get(remark.node or "", len(place)))
        changes = attributed(compare(before, Snapshot.of(graph_module.graph)), graph_module, remarks)
        rewritten = [remark for remark in remarks if remark.kind == "applied"]
        if bool(rewritten) != bool(changes):
            told, done = len(rewritten), len(changes)
            raise PassError(
                f"{self.name} {BROKE_ITS_CONTRACT}: {told} candidates reported rewritten, {done} nodes differ"
            )
        seconds = time.perf_counter() - started
        unmet = unmet_by(self.mechanism, remarks, scope.overrides)
        yield PassReport(self.name, str(self), tuple(remarks), tuple(changes), seconds, unmet)


class Scope:
    """What one run of a pass may touch, and with which options."""

    def __init__(
        self,
        owner: Pass,
        graph_module: GraphModule,
        within: tuple[tuple[Selector | None, Selector | None], ...],
    ) -> None:
        index = NodeIndex(graph_module)
        self._selections = [Selection.of(index, only, exclude) for only, exclude in within]
        self.overrides = [(index.matches(entry.selector), dict(entry.options)) for entry in owner.overrides]
        self._owner = owner
        self._variants: dict[tuple[int, ...], Pass] = {}
        self._stands_for: dict[Node, Node] = {}

    def let_stand_for(self, node: Node, original: Node) -> None:
        """Let what holds for a node hold for one that the pass has made since."""
        self._stands_for[node] = original

    def options(self, owner: PassT, node: Node | None, layer: str) -> PassT | str:
        """Return the pass with the options that hold for a candidate, or words on why it is out.

        Args:
            owner: the pass that asks.
            node: the candidate; None for a layer that is never called.
            layer: path of its layer.
        """
        node = node if node is None else self._stands_for.get(node, node)
        for selection in self._selections:
            reason = selection.why_not(node, layer)
            if reason is not None:
                return reason
        chosen = self.variant(owner, node, layer)
        return chosen if chosen.enabled else "switched off here (enabled=False)"

    def variant(self, owner: PassT, node: Node | None, layer: str) -> PassT:
        """Return the pass with the options that hold for a place, whether the pass may rewrite it or not."""
        node = node if node is None else self._stands_for.get(node, node)
        active = tuple(
            number
            for number, (matches, _) in enumerate(self.overrides)
            if any(picks(match, node, layer) for match in matches)
        )
        if active not in self._variants:
            options: dict[str, Any] = {}
            for number in active:
                options.update(self.overrides[number][1])
            self._variants[active] = dataclasses.replace(self._owner, overrides=(), **options)
        chosen = self._variants[active]
        if not isinstance(chosen, type(owner)):
            raise PassError(f"the scope of {self._owner.name} was asked for the options of {owner.name}")
        return chosen

    def idle_selections(self, remarks: list[Remark]) -> list[Remark]:
        """Return a remark for each pattern that picks something, but no candidate of the pass."""
        nodes = {remark.node for remark in remarks}
        layers = {remark.layer for remark in remarks}
        wanted = [("only", match) for selection in self._selections for match in selection.only or ()]
        wanted += [("override", match) for matches, _ in self.overrides for match in matches]
        return [
            self._idle(side, match)
            for side, match in wanted
            if not {node.name for node in match.nodes} & nodes and not match.paths & layers
        ]

    def _idle(self, side: str, match: Match) -> Remark:
        first = min(match.nodes).name if match.nodes else None
        what = f"{len(match.nodes)} nodes" if match.nodes else f"{len(match.paths)} modules, never called"
        message = (
            f"{side}={show_pattern(match.pattern)} picks {what}, none of which {self._owner.name} acts on"
        )
        return Remark("missed", first, min(match.paths, default=""), message, {"picked": len(match.nodes)})


def _fates(reports: tuple[PassReport, ...]) -> tuple[dict[str, str], set[str]]:
    """Return why layers were left alone, and which were not."""
    remarks = [remark for entry in reports for remark in entry.remarks]
    done = {remark.layer for remark in remarks if remark.kind == "applied"}
    return {remark.layer: remark.message for remark in reversed(remarks) if remark.kind == "missed"}, done


def _erase_orphans(graph_module: GraphModule, unused_before: set[Node]) -> None:
    """Erase what the pass left without a user; what the model itself never used stays, and so do effects."""
    for node in reversed(graph_module.graph.nodes):
        if not node.users and node not in unused_before and _is_pure(node):
            graph_module.graph.erase_node(node)


def _is_pure(node: Node) -> bool:
    computes = node.op in ("call_function", "call_method") and not node.is_impure()
    return node.op == "get_attr" or (computes and not changes_in_place(node))
