"""What a pass is: a frozen record of options that rewrites a graph and remarks on what it did."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from biofx.capture.capture import capture
from biofx.capture.exported_programs import is_exported
from biofx.errors import BiofxError, InputError, OptionError, PassError, add_note, suggest
from biofx.foreign_errors import BY_A_PASS, foreign_errors_wrapped
from biofx.garbage import garbage_left
from biofx.graph.analysis_cache import analyses_kept, unchanged
from biofx.graph.changes import compare, snapshot_of
from biofx.graph.graph_view import GraphView
from biofx.graph.node_kinds import changes_in_place
from biofx.layers.sites import find_sites, innermost_path
from biofx.layers.weight_site import Sites
from biofx.model.graph_module import BioGraphModule
from biofx.model.region_parts import joined
from biofx.options import declared_options
from biofx.progress import advance
from biofx.rewriting.mechanism_coverage import mechanisms_of
from biofx.rewriting.model_coverage import coverage_of
from biofx.rewriting.pass_text import format_item
from biofx.rewriting.remarks import PassReport, Remark, switched_off, unmet_by
from biofx.rewriting.report import Report
from biofx.rewriting.scope import ChangeRecorder, Scope, Selections
from biofx.select import Override, Selector, check_selector
from biofx.structured_trace import trace_artifact

if TYPE_CHECKING:
    from typing_extensions import Self

PassT = TypeVar("PassT", bound="Pass")

BROKE_ITS_CONTRACT = "broke its contract"
"""Words of every error that is the fault of a pass."""
_EVERY_PASS = ("only", "exclude", "enabled", "overrides")


class Place(Protocol):
    """A candidate with more to it than a node, such as a :class:`~biofx.layers.weight_site.WeightSite`."""

    @property
    def node(self) -> Node | None:
        """The node that is selected or not; None for a layer that the graph never calls."""

    @property
    def layer(self) -> str:
        """Path of the layer, empty for the model itself."""


class PassResult(NamedTuple):
    """A rewritten graph and what was done to it; unpacks as ``graph_module, report``."""

    graph_module: BioGraphModule
    report: Report

    def __repr__(self) -> str:
        model = self.graph_module
        told = f"{type(model).__name__} with {len(model.graph.nodes)} nodes"
        return f"{type(self).__name__}(graph_module=<{told}>, report={self.report!r})"

    @property
    def modified(self) -> bool:
        """Whether the graph differs from the one that went in."""
        return self.report.modified

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Say that the model is one of the two.

        Raises:
            InputError: always.
        """
        raise InputError(_UNPACK.format("called"))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_UNPACK.format(f"asked for {name!r}"), name=name, obj=self)


_UNPACK = (
    "expected a model, found the pair of model and report that is {}; unpack it: "
    "bio_model, report = biofx.transform(…)"
)


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite of a graph.

    A subclass is a frozen dataclass; its fields are its options. It sets :attr:`name`, checks its options
    in ``__post_init__`` and implements :meth:`candidates` and :meth:`rewrite_node`, or, where it must see the
    whole graph at once, :meth:`rewrite`. Calling a pass never changes the graph module that it is given: it
    works on a copy. Dead code, linting and recompiling are done by the caller of these methods.
    """

    name: ClassVar[str]
    """The name of the pass in the text of a pipeline."""
    after: ClassVar[tuple[str, ...]] = ()
    """Names of the passes that must run earlier, where both are in a pipeline."""
    mechanism: ClassVar[str] = ""
    """What the pass adds to a model, as the report says where it could not; empty if it adds nothing."""

    only: Selector | None = None
    """Rewrite only what this selects (see :mod:`biofx.select`); None selects everything."""
    exclude: Selector | None = None
    """Leave alone what this selects."""
    enabled: bool = True
    """Whether the pass acts at all; an override may switch it on or off for some layers."""
    overrides: tuple[Override, ...] = ()
    """Options for parts of the model; where several hold, the last one wins."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Refuse an option that the pass does not have, which Python would do with a TypeError."""
        known = cls.option_names()
        for name in options:
            if name not in known:
                raise OptionError(f"{cls.name} has no option {name!r}{suggest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        cls = type(self)
        if cls.rewrite is Pass.rewrite and Pass.rewrite_node is cls.rewrite_node:
            raise TypeError(f"{cls.__name__} must implement candidates and rewrite_node, or rewrite")
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

    def candidates(self, graph_module: BioGraphModule) -> Iterable[Node | Place | Remark]:
        """Return what the pass may rewrite: nodes, weight sites, or anything with a ``node`` and a ``layer``.

        All of them are found before the first is rewritten, so a candidate can carry what an analysis says of
        the graph as it is before the pass. A remark among them goes into the report as it is; it is for what
        looks like a candidate and cannot be rewritten, whatever the options.
        """
        raise NotImplementedError

    def rewrite_node(self, candidate: Any, options: Self) -> Remark | Iterable[Remark]:
        """Rewrite one candidate in place, and say so.

        It is called for the candidates that ``only``, ``exclude`` and ``enabled`` leave. Every node that is
        created, changed or erased meanwhile belongs to the candidate in the report.

        Args:
            candidate: one of :meth:`candidates`.
            options: the pass with the options that hold for it, overrides included. The method is called on
                this same object, so ``self`` and ``options`` never differ.

        Returns:
            What was done, or why the candidate was left alone: :func:`biofx.applied` or
            :func:`biofx.missed`. Several remarks where a candidate has several uses.
        """
        raise NotImplementedError

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Rewrite the graph in place, yielding a remark for each candidate.

        Override it where the whole graph must be seen at once. ``scope.options(self, node, layer)`` returns
        the options that hold for a candidate, or the reason why it is left alone. What is changed before a
        remark is yielded belongs to the candidate of that remark, or of the next that says "applied"; where
        that does not fit, change the graph inside ``with scope.rewriting(node)``.
        """
        for candidate in list(self.candidates(graph_module)):
            if isinstance(candidate, Remark):
                yield candidate
                continue
            node = candidate if isinstance(candidate, Node) else candidate.node
            layer = innermost_path(candidate) if isinstance(candidate, Node) else candidate.layer
            reason = scope.why_not(node, layer)
            if reason is not None:
                yield switched_off(node, layer, reason)
                continue
            options = scope.variant(self, node, layer)
            with scope.changes.belongs_to(node):
                made: Any = options.rewrite_node(candidate, options)
                if made is None:
                    raise PassError(
                        f"{self.name} {BROKE_ITS_CONTRACT}: rewrite_node returned None for "
                        f"{layer if node is None else node.name!r}; return a remark for each candidate"
                    )
                remarks = [made] if isinstance(made, Remark) else list(made)
            yield from remarks

    def ensures(self, graph_module: GraphModule) -> None:  # noqa: B027
        """Check the graph that the pass made.

        Raises:
            PassError: it is not what the pass promises.
        """

    def __call__(self, graph_module: GraphModule | ExportedProgram) -> PassResult:
        """Return a rewritten copy of a graph module, and a report.

        Args:
            graph_module: what :func:`biofx.capture` returned, any other graph module, or a program of
                ``torch.export``; of a graph of dynamo or of ``make_fx`` operators become functions and layers
                first, as in :func:`biofx.capture`.

        Raises:
            InputError: it is not a graph module.
            CaptureError: a program cannot be written as a model.
            SelectorError: a pattern matches nothing.
            PassError: the pass cannot run on this graph.
        """
        if is_exported(graph_module) and not isinstance(graph_module, BioGraphModule):
            return self.on_own(capture(graph_module))
        if not isinstance(graph_module, GraphModule):
            raise InputError(
                f"{self.name}: expected a torch.fx.GraphModule, found {type(graph_module).__name__}; "
                "capture the model first (biofx.capture), or use biofx.transform"
            )
        return self.on_own(BioGraphModule.copy_of(graph_module))

    def on_own(
        self, graph_module: BioGraphModule, finish: Callable[[Sites], object] = lambda sites: None
    ) -> PassResult:
        """Do the same in place, on a graph module that the caller owns and will not use unchanged.

        ``finish`` is called last, with the weight sites of the rewritten graph.
        """
        with joined(graph_module), analyses_kept(), garbage_left():
            first = snapshot_of(graph_module)
            view = GraphView.of(graph_module, first.lines)
            reports = tuple(self.run(graph_module, ()))
            with unchanged():
                last = snapshot_of(graph_module)
                views = view, GraphView.of(graph_module, last.lines) if reports else view
                sites = find_sites(graph_module)
                coverage = dataclasses.replace(
                    coverage_of(graph_module, sites, *_fates(reports)),
                    mechanisms=mechanisms_of(graph_module, sites, reports),
                )
            if reports:
                graph_module.recompile()
            finish(sites)
        causes = {change.node: change.cause for entry in reports for change in entry.changes}
        changes = tuple(
            dataclasses.replace(change, cause=causes.get(change.node)) for change in compare(first, last)
        )
        report = Report(type(graph_module).__name__, reports, changes, *views, coverage)
        trace_artifact(f"biofx_{self.name}", lambda: str(report))
        return PassResult(graph_module, report)

    def run(self, graph_module: BioGraphModule, within: Selections) -> Iterator[PassReport]:
        """Run the pass in place, with all checks; ``within`` has the selections of the pipelines around.

        The code is generated for passes that are not ours, which may run it; for others at the end.
        """
        started = time.perf_counter()
        is_ours = type(self).__module__.partition(".")[0] == __name__.partition(".")[0]
        if not is_ours:
            graph_module.recompile()
        before = snapshot_of(graph_module)
        unused = {node for node in graph_module.graph.nodes if not node.users}
        try:
            self.requires(graph_module)
            scope = Scope(self, graph_module, (*within, (self.only, self.exclude)))
            with scope.changes.recording():
                remarks = list(self._remarks(graph_module, scope))
                _erase_orphans(graph_module, unused, scope.changes)
            remarks += scope.idle_selections(remarks)
            graph_module.graph.lint()
            if not is_ours:
                graph_module.recompile()
            self.ensures(graph_module)
        except BiofxError:
            raise
        except Exception as error:
            if is_ours:
                with foreign_errors_wrapped(PassError, f"{self.name} {BROKE_ITS_CONTRACT}: it"):
                    raise
            add_note(error, f"{BY_A_PASS}{self}, which was given this graph:\n{before.text}")
            raise
        place = {name: number for number, name in enumerate(before.lines)}
        remarks.sort(key=lambda remark: place.get(remark.node or "", len(place)))
        changes = scope.changes.with_causes(compare(before, snapshot_of(graph_module)), remarks)
        rewritten = [remark for remark in remarks if remark.kind == "applied"]
        if bool(rewritten) != bool(changes):
            raise PassError(
                f"{self.name} {BROKE_ITS_CONTRACT}: {len(rewritten)} candidates reported rewritten, "
                f"{len(changes)} nodes differ"
            )
        seconds = time.perf_counter() - started
        unmet = unmet_by(self.mechanism, remarks, scope.overrides)
        yield PassReport(self.name, str(self), tuple(remarks), changes, seconds, unmet)

    def _remarks(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Yield the remarks of :meth:`rewrite`, and let what was changed before each belong to it."""
        remarks: Any = self.rewrite(graph_module, scope)
        if not isinstance(remarks, Iterator):
            found = "None" if remarks is None else f"a {type(remarks).__name__}"
            raise PassError(
                f"{self.name} {BROKE_ITS_CONTRACT}: rewrite returned {found}; yield a remark for each "
                "candidate, once it is rewritten: what was changed since the last one belongs to it"
            )
        for remark in remarks:
            if not isinstance(remark, Remark):
                raise PassError(
                    f"{self.name} {BROKE_ITS_CONTRACT}: expected a remark (biofx.applied or biofx.missed) "
                    f"for each candidate, found {remark!r}"
                )
            if remark.kind == "applied":
                scope.changes.claim(remark.node)
            advance(self.name)
            yield remark


def _fates(reports: tuple[PassReport, ...]) -> tuple[dict[str, str], set[str]]:
    """Return why layers were left alone, and which were not."""
    remarks = [remark for entry in reports for remark in entry.remarks]
    done = {remark.layer for remark in remarks if remark.kind == "applied"}
    return {remark.layer: remark.message for remark in reversed(remarks) if remark.kind == "missed"}, done


def _erase_orphans(graph_module: GraphModule, unused_before: set[Node], changes: ChangeRecorder) -> None:
    """Erase what the pass left without a user; what the model itself never used stays, and so do effects."""
    for node in reversed(graph_module.graph.nodes):
        if not node.users and node not in unused_before and _is_pure(node):
            changes.erase_orphan(node)


def _is_pure(node: Node) -> bool:
    computes = node.op in ("call_function", "call_method") and not node.is_impure()
    return node.op == "get_attr" or (computes and not changes_in_place(node))
