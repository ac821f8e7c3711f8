"""Several passes as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from biofx.errors import OptionError, PipelineError
from biofx.graph.changes import snapshot_of
from biofx.model.graph_module import BioGraphModule
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.pass_text import ParsedItem, format_item, parse_items
from biofx.rewriting.registry import find_pass
from biofx.rewriting.remarks import PassReport, Remark
from biofx.rewriting.scope import Scope, Selections
from biofx.select import Override

Observer = Callable[[str, str, str], object]
"""Called with a pass's text and the graph's text before and after it."""


@dataclass(frozen=True, kw_only=True)
class Pipeline(Pass):
    """Passes in an order that respects what each declares must run before it; itself a pass.

    Passes that declare nothing about each other keep the order they are given in.

    >>> pipeline = Pipeline.parse("scale-gradients{nu=0.1},split-weights{gamma=4},constrain-signs")
    >>> print(pipeline)
    split-weights{gamma=4},constrain-signs,scale-gradients{nu=0.1}
    >>> Pipeline.parse(str(pipeline)) == pipeline
    True
    """

    name: ClassVar[str] = "pipeline"

    passes: tuple[Pass, ...] = field(default=(), kw_only=False)
    """The passes; after construction in the order in which they run."""
    observe: Observer | None = field(default=None, compare=False)
    """Called after each pass that changed the graph, those of inner pipelines too, e.g.
    :func:`biofx.graph.print_changed`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overrides:
            raise OptionError("a pipeline has no options to override; override those of its passes")
        if self.observe is not None and not callable(self.observe):
            raise OptionError(f"observe: expected a callable of three texts, found {self.observe!r}")
        passes: object = self.passes
        if not isinstance(passes, Iterable) or isinstance(passes, str):
            raise PipelineError(
                f"expected a sequence of passes, found {passes!r}; see Pipeline.parse for text"
            )
        given = tuple(passes)
        for entry in given:
            if not isinstance(entry, Pass):
                raise PipelineError(
                    f"expected passes, found {entry!r} among them; see Pipeline.parse for text, and write "
                    "a pass with its options behind it: SplitWeights(gamma=2)"
                )
        object.__setattr__(self, "passes", _ordered(given))

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read a pipeline from its text (the grammar is in :mod:`biofx.rewriting.pass_text`).

        Raises:
            PipelineError: malformed text, an unknown pass, a cyclic order.
            OptionError: an unknown option or a bad value.
        """
        if not isinstance(text, str):
            raise PipelineError(f"expected a pipeline as text, found {type(text).__name__}")
        return cls(tuple(_build(item) for item in parse_items(text)))

    def __str__(self) -> str:
        inner = ",".join(f"({entry})" if _is_bare_pipeline(entry) else str(entry) for entry in self.passes)
        given = self._given()
        return format_item(f"({inner})", given, []) if given else inner

    def _given(self) -> dict[str, Any]:
        """Return the options that are not at their defaults."""
        shared = {"only": self.only, "exclude": self.exclude, "enabled": None if self.enabled else False}
        return {name: value for name, value in shared.items() if value is not None}

    def run(self, graph_module: BioGraphModule, within: Selections) -> Iterator[PassReport]:
        """Run the passes one after the other, in place."""
        if not self.enabled:
            return
        selections = (*within, (self.only, self.exclude))
        for entry in self.passes:
            if isinstance(entry, Pipeline):
                inner = dataclasses.replace(entry, observe=self.observe) if self.observe else entry
                yield from inner.run(graph_module, selections)
                continue
            before = snapshot_of(graph_module) if self.observe else None
            yield from entry.run(graph_module, selections)
            if self.observe and before and (after := snapshot_of(graph_module)).lines != before.lines:
                self.observe(str(entry), before.text, after.text)

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Yield the remarks of all passes."""
        for report in self.run(graph_module, ()):
            yield from report.remarks


def stages_of(entry: Pass) -> tuple[Pass, ...]:
    """Return the innermost passes of a pipeline in the order they run, each with the selections around it.

    >>> pipeline = Pipeline.parse("(split-weights,(scale-gradients){exclude=fc}){only=fc*}")
    >>> [str(stage) for stage in stages_of(pipeline)]
    ['(split-weights){only=fc*}', '((scale-gradients){exclude=fc}){only=fc*}']
    """
    return tuple(_stages(entry))


def _stages(entry: Pass) -> Iterator[Pass]:
    if not isinstance(entry, Pipeline):
        yield entry
    elif entry.enabled:
        for member in entry.passes:
            for stage in _stages(member):
                selects = entry.only is not None or entry.exclude is not None
                yield dataclasses.replace(entry, passes=(stage,), observe=None) if selects else stage


def _is_bare_pipeline(entry: Pass) -> bool:
    return isinstance(entry, Pipeline) and not entry._given()


def _ordered(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """Sort by the declared dependencies; ties keep their order."""
    import networkx

    given = tuple(passes)
    order = networkx.DiGraph()
    order.add_nodes_from(range(len(given)))
    for late, entry in enumerate(given):
        order.add_edges_from((early, late) for early, other in enumerate(given) if other.name in entry.after)
    try:
        return tuple(given[number] for number in networkx.lexicographical_topological_sort(order))
    except networkx.NetworkXUnfeasible:
        edges = [
            f"{given[late].name} after {given[early].name}" for early, late in networkx.find_cycle(order)
        ]
        raise PipelineError(f"the order of the passes is cyclic: {', '.join(edges)}") from None


def _build(item: ParsedItem) -> Pass:
    overrides = tuple(Override(selector, tuple(options.items())) for selector, options in item.overrides)
    options: dict[str, Any] = dict(item.options)
    if overrides:
        options["overrides"] = overrides
    if item.name is None:
        members = tuple(_build(member) for member in item.members)
        return dataclasses.replace(Pipeline.from_options(options), passes=members)
    return find_pass(item.name).from_options(options)
