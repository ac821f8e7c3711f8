"""A pipeline as the sequence of its innermost passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from biofx.rewriting.pass_base import Pass
from biofx.rewriting.pipeline import Pipeline


def stages_of(entry: Pass) -> tuple[Pass, ...]:
    """Return the passes that do the work, in the order they run, each with the selections around it.

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
                yield replace(entry, passes=(stage,), observe=None) if selects else stage
