"""Which rewrite is to blame: the first pass, then the first node, after which something goes wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from biofx.capture.capture import capture
from biofx.config import BioConfig
from biofx.errors import BisectError, InputError, add_note
from biofx.graph.joined_graph import whole_graph
from biofx.model.graph_module import BioGraphModule
from biofx.progress import advance
from biofx.rewriting.compile_config import PassChoice, choose_passes
from biofx.rewriting.pass_base import Pass, PassResult
from biofx.rewriting.pipeline import Pipeline, stages_of
from biofx.rewriting.remarks import PassReport
from biofx.rewriting.reproducer import without_reproducers, write_reproducer
from biofx.select import Candidate, Selector
from biofx.transform import as_config, transform


@dataclass(frozen=True)
class BisectResult:
    """What :func:`bisect` found; print it."""

    stage: Pass
    """The first pass after which the predicate is true, with the selections around it."""
    node: str | None
    """The first node whose rewrite makes it true; None where the pass fails whatever it may touch."""
    symptom: str
    """What the predicate, or the pass, did."""
    report: PassReport | None
    """What the pass did to that node; None where it raised."""
    alone: bool
    """Whether the rewrite of that node alone is enough, without those of the nodes before it."""
    passes: tuple[Pass, ...]
    """The fewest passes found that make the predicate true, in order."""
    tries: int
    """How often the model was rewritten and asked about, a count."""
    reproducer: Path | None = None
    """The script that shows it again."""
    without: str = ""
    """Why the reproducer has to do without the predicate, or was not written; empty if neither."""

    def __str__(self) -> str:
        where = f", and {self.node} the first node" if self.node else ", whatever node it may touch"
        lines = [f"{self.stage} is the first pass after which {self.symptom}{where}"]
        for remark in self.report.remarks if self.report else ():
            lines += [f"  {remark}"] if remark.node == self.node else []
        for change in self.report.changes if self.report else ():
            if change.cause == self.node:
                lines.append(f"  {change.kind:<8} {change.before if change.after is None else change.after}")
        if self.node:
            lines.append(
                "the rewrite of that node alone is enough"
                if self.alone
                else "that takes the rewrites of the nodes before it, too"
            )
        lines.append(f"to see it: {Pipeline(self.passes)}")
        lines.append(f"found in {self.tries} tries")
        if self.reproducer:
            lines.append(f"reproducer: python {self.reproducer}")
        return "\n".join([*lines, self.without] if self.without else lines)


def bisect(
    model: nn.Module,
    config: BioConfig | Mapping[str, Any] | None = None,
    predicate: Callable[[BioGraphModule], object] | None = None,
    *,
    passes: PassChoice | None = None,
    only: Selector | None = None,
    exclude: Selector | None = None,
    opaque: Sequence[str] = (),
    reproducer: str | os.PathLike[str] | None = None,
) -> BisectResult:
    """Find the rewrite that makes a predicate true, by halving: the first pass, then the first node.

    The predicate gets a rewritten model, a new one at each try, and returns something true where it goes
    wrong. An exception counts too: where the whole pipeline, or the predicate after it, raises one, what is
    looked for is the rewrite that leads to an exception of that type. Random numbers that the predicate
    draws should come from a seed of its own.

    Args:
        model: as for :func:`biofx.transform`; so are the arguments not named here.
        config: likewise.
        predicate: None where it is a pass that raises.
        passes: likewise.
        only: likewise.
        exclude: likewise.
        opaque: likewise.
        reproducer: a folder for a script that shows it again, and runs without the files of the model.

    Returns:
        The pass and the node, with what was done there.

    Raises:
        BisectError: the predicate is true of the model as it is, or not true after all passes.

    What the predicate or a pass raises besides comes through.

    >>> import torch
    >>> def is_not_finite(bio_model):
    ...     return not bio_model(torch.ones(1, 2)).isfinite().all()
    >>> layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> result = bisect(layers, passes="scale-gradients,split-weights{activation=torch.acosh}",
    ...                  predicate=is_not_finite)
    >>> result.stage.name, result.node, result.alone
    ('split-weights', '_0', True)
    """
    checked = as_config(config)
    pipeline: Pass = choose_passes(passes, checked)
    if only is not None or exclude is not None:
        pipeline = Pipeline((pipeline,), only=only, exclude=exclude)
    search = _Search(capture(model, opaque=opaque), checked, predicate)
    result = search.run(stages_of(pipeline))
    return result if reproducer is None else search.reproduced(result, reproducer)


@dataclass(frozen=True)
class _Chosen:
    """Selects nodes by name, and by nothing else."""

    names: frozenset[str]

    def __call__(self, candidate: Candidate) -> bool:
        return candidate.name in self.names


def _everything(candidate: Candidate) -> bool:
    return True


@dataclass
class _Search:
    """Asks the predicate about rewritten models, each once."""

    captured: BioGraphModule
    config: BioConfig | None
    predicate: Callable[[BioGraphModule], object] | None
    wanted: type[Exception] | None = None
    """The type of the exception that is looked for, None for a predicate that is true."""
    symptom: str = ""
    tries: int = 0
    last: PassResult | None = field(default=None, repr=False)

    def run(self, stages: tuple[Pass, ...]) -> BisectResult:
        self._look_at_both_ends(stages)
        good, bad = 0, len(stages)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if self._is_bad(stages[:middle]) else (middle, bad)
        earlier, stage = stages[:good], stages[good]
        fewest: tuple[Pass, ...]
        names = self._candidates(earlier, stage)
        if not names or self._is_bad((*earlier, Pipeline((stage,), exclude=_everything))):
            fewest = self._without_earlier(earlier, stage)
            return BisectResult(stage, None, self.symptom, None, False, fewest, self.tries)
        good, bad = 0, len(names)
        while bad - good > 1:
            middle = (good + bad) // 2
            chosen = self._is_bad((*earlier, _limited(stage, names[:middle])))
            good, bad = (good, middle) if chosen else (middle, bad)
        node = names[good]
        alone = self._is_bad((*earlier, _limited(stage, [node])))
        last = _limited(stage, [node] if alone else names[:bad])
        fewest = self._without_earlier(earlier, last)
        report = self.last.report.passes[-1] if self.last is not None else None
        return BisectResult(stage, node, self.symptom, report, alone, self._named(fewest), self.tries)

    def reproduced(self, result: BisectResult, folder: str | os.PathLike[str]) -> BisectResult:
        """Write the reproducer; without the predicate where that cannot come along."""
        without = ""
        for predicate in (self.predicate, None):
            try:
                path = write_reproducer(
                    folder,
                    self.captured,
                    result.passes,
                    str(result),
                    config=self.config,
                    predicate=predicate,
                )
            except InputError as error:
                without = without or f"the predicate is not in the reproducer: {error}"
                if predicate is None:
                    return replace(result, without=f"no reproducer was written: {error}")
            else:
                return replace(result, reproducer=path, without=without)
        return result

    def _look_at_both_ends(self, stages: tuple[Pass, ...]) -> None:
        """Make sure that there is something to find.

        Raises:
            BisectError: there is not.
        """
        try:
            before = self._ask(())
        except Exception as error:
            raise BisectError(
                f"the predicate raises {type(error).__name__} for the model as it is, before any pass: "
                f"{error}"
            ) from error
        if before:
            raise BisectError("the predicate is true of the model as it is, before any pass")
        try:
            after = self._ask(stages)
        except Exception as error:
            self.wanted = type(error)
            self.symptom = f"{type(error).__name__} is raised ({error})".replace("\n", " ")
            return
        if not after:
            raise BisectError(
                f"the predicate is not true after all {len(stages)} passes, {Pipeline(stages)}: there is "
                "nothing to find"
            )
        self.symptom = "the predicate is true"

    def _is_bad(self, passes: tuple[Pass, ...]) -> bool:
        try:
            found = bool(self._ask(passes))
        except Exception as error:
            if self.wanted is not None and isinstance(error, self.wanted):
                return True
            add_note(
                error, f"raised while looking for the pass after which {self.symptom}, by {Pipeline(passes)}"
            )
            raise
        return found and self.wanted is None

    def _ask(self, passes: tuple[Pass, ...]) -> object:
        self.tries += 1
        advance("bisect")
        self.last = None
        with without_reproducers():
            self.last = transform(self.captured, self.config, passes=Pipeline(passes))
        return self.predicate is not None and self.predicate(self.last.graph_module)

    def _candidates(self, earlier: tuple[Pass, ...], stage: Pass) -> list[str]:
        """Return the nodes that the pass rewrites, or, where it raises, all nodes that it could."""
        before = transform(self.captured, self.config, passes=Pipeline(earlier)).graph_module
        try:
            with without_reproducers():
                report = stage(before).report
        except Exception:
            return [node.name for node in whole_graph(before).nodes]
        return [r.node for r in report.remarks if r.kind == "applied" and r.node is not None]

    def _without_earlier(self, earlier: tuple[Pass, ...], last: Pass) -> tuple[Pass, ...]:
        """Leave out what is not needed of the passes before, the first ones first."""
        kept = list(earlier)
        for entry in earlier:
            fewer = [other for other in kept if other is not entry]
            if self._is_bad((*fewer, last)):
                kept = fewer
        if not self._is_bad((*kept, last)):  # run again, so that ``last`` is of these passes
            raise BisectError("the predicate gives different answers for the same model; seed what it draws")
        return (*kept, last)

    def _named(self, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        """Say nodes by name, where names alone do the same: a pipeline's text can then be read back."""
        *earlier, last = passes
        if not isinstance(last, Pipeline) or not isinstance(last.only, _Chosen):
            return passes
        result = self.last
        order = [node.name for node in whole_graph(self.captured).nodes]
        names = sorted(last.only.names, key=lambda name: order.index(name) if name in order else len(order))
        named = (*earlier, Pipeline(last.passes, only=tuple(names) if len(names) > 1 else names[0]))
        same = self._is_bad(named)
        self.last = result
        return named if same else passes


def _limited(stage: Pass, names: Sequence[str]) -> Pass:
    return Pipeline((stage,), only=_Chosen(frozenset(names)))
