"""How a transformed model was made, so that the same can be done to a fresh copy of the original."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from biofx._version import __version__
from biofx.config import BioConfig
from biofx.errors import CheckpointError, SelectorError
from biofx.model.called_again import lines_as_transformed
from biofx.model.graph_module import BioGraphModule
from biofx.rewriting.pass_base import Pass, PassT
from biofx.rewriting.pass_text import format_value
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.plain_passes import config_to_plain, pass_to_plain, with_new_options
from biofx.rewriting.remarks import Unmet
from biofx.select import Candidate, NodeIndex, Override, Selector

ATTRIBUTE = "transform_record"
"""The attribute of a transformed model that holds its record."""
COMPILED = "compile"
"""The door of a companion (:func:`biofx.companion`), whose graphs are those that a compiler made."""


@dataclass(frozen=True)
class TransformStep:
    """One call of ``biofx.transform`` or of a converter."""

    door: str
    """``"transform"``, :data:`COMPILED`, or the name of the converter's class."""
    pipeline: str
    """The passes that ran, as text."""
    passes: Mapping[str, Any]
    """The passes with all options, as plain values (see :mod:`biofx.rewriting.plain_passes`)."""
    config: Mapping[str, Any] | None
    """The config as plain values; None if there was none."""
    opaque: tuple[str, ...]
    """Paths of the modules that were captured as one call."""
    recorded: bool
    """Whether the model was recorded with example inputs."""
    matches: Mapping[str, list[str]]
    """For each selector that is a text, the nodes of the captured graph that it picked."""
    unmet: tuple[Mapping[str, Any], ...] = ()
    """What was asked for and is not in the model: fields of :class:`~biofx.rewriting.remarks.Unmet`."""


@dataclass(frozen=True)
class TransformRecord:
    """How a transformed model was made; part of its copies, pickles and checkpoints."""

    model: str
    """Class name of the original."""
    biofx: str
    """Version of biofx."""
    torch: str
    """Version of torch."""
    steps: tuple[TransformStep, ...]
    """What was done, in order; more than one where a transformed model was transformed again."""
    graph: tuple[str, ...]
    """The graph that came out, line by line."""

    @property
    def seed(self) -> int | None:
        """The seed of the last config, None where there was none."""
        configs = [step.config for step in self.steps if step.config is not None]
        return int(configs[-1]["seed"]) if configs else None

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> TransformRecord:
        """Read :meth:`to_json`.

        Raises:
            CheckpointError: it is not the text of a record.
        """
        try:
            fields = json.loads(text)
            steps = tuple(
                TransformStep(
                    **{
                        **step,
                        "passes": with_new_options(step["passes"]),
                        "opaque": tuple(step["opaque"]),
                        "unmet": tuple(step.get("unmet", ())),
                    }
                )
                for step in fields.pop("steps")
            )
            return cls(**{**fields, "steps": steps, "graph": tuple(fields["graph"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"expected the record of a transform, found something else: {error}"
            ) from error


class RememberingPredicate:
    """A user's predicate that keeps the names of the nodes it picked, so that they can be picked again."""

    def __init__(self, predicate: Any) -> None:
        self.predicate = predicate
        self.__qualname__ = getattr(predicate, "__qualname__", type(predicate).__name__)
        self.picked: set[str] = set()

    def __call__(self, candidate: Candidate) -> bool:
        """Call the predicate, and remember the node if it picks it."""
        answer = bool(self.predicate(candidate))
        if answer:
            self.picked.add(candidate.name)
        return answer


def remembering(entry: PassT) -> PassT:
    """Return a pass whose predicates, and those of the passes inside it, remember what they pick."""
    changed: dict[str, Any] = {
        side: _remembering_selector(getattr(entry, side))
        for side in ("only", "exclude")
        if getattr(entry, side) is not None
    }
    if entry.overrides:
        changed["overrides"] = tuple(
            Override(_remembering_selector(override.selector), override.options)
            for override in entry.overrides
        )
    if isinstance(entry, Pipeline):
        changed["passes"] = tuple(remembering(member) for member in entry.passes)
    return dataclasses.replace(entry, **changed) if changed else entry


def remembering_config(config: BioConfig) -> BioConfig:
    """Return a config whose predicates remember what they pick."""
    overrides = tuple(
        Override(_remembering_selector(override.selector), override.options) for override in config.overrides
    )
    return dataclasses.replace(config, overrides=overrides) if overrides else config


def _remembering_selector(selector: Selector) -> Selector:
    if isinstance(selector, tuple):
        return tuple(_remembering_selector(pattern) for pattern in selector)  # type: ignore[misc]
    return selector if isinstance(selector, str) else RememberingPredicate(selector)


def matches_of(entry: Pass, captured: GraphModule) -> dict[str, list[str]]:
    """Return what each selector with a text picks in a captured graph, before any pass has run."""
    index = NodeIndex(captured)
    found: dict[str, list[str]] = {}
    for pattern in _patterns_of(entry):
        try:
            match = index.match(pattern)
        except SelectorError:
            continue
        found[format_value(pattern)] = sorted({node.name for node in match.nodes} | match.paths)
    return found


def _patterns_of(entry: Pass) -> Iterator[str]:
    selectors = [entry.only, entry.exclude, *(override.selector for override in entry.overrides)]
    for selector in selectors:
        patterns = selector if isinstance(selector, tuple) else (selector,)
        yield from (pattern for pattern in patterns if isinstance(pattern, str))
    if isinstance(entry, Pipeline):
        for member in entry.passes:
            yield from _patterns_of(member)


def add_step(
    made: BioGraphModule,
    door: str,
    pipeline: Pass,
    config: BioConfig | None,
    *,
    opaque: tuple[str, ...] = (),
    recorded: bool = False,
    matches: Mapping[str, list[str]] | None = None,
    unmet: Iterable[Unmet] = (),
) -> None:
    """Add a step to the record of a model that has just been transformed."""
    before = record_of(made)
    options = None if config is None else config_to_plain(config)
    step = TransformStep(
        *(door, str(pipeline), pass_to_plain(pipeline), options, opaque, recorded, dict(matches or {})),
        unmet=tuple(dict(vars(entry)) for entry in unmet),
    )
    made.__dict__[ATTRIBUTE] = TransformRecord(
        type(made).__name__,
        __version__,
        torch.__version__,
        ((*before.steps, step) if before is not None else (step,)),
        lines_as_transformed(made),
    )


def record_of(model: Any) -> TransformRecord | None:
    """Return the record of a model, None if it has none."""
    found = vars(model).get(ATTRIBUTE)
    return found if isinstance(found, TransformRecord) else None
