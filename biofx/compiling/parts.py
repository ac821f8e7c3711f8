"""What a part of a model does not say about the whole, where the compiler cut the model in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from biofx.analysis.readouts import readout_nodes
from biofx.analysis.unit_groups import unit_groups
from biofx.compiling.dynamo_frames import Compilation
from biofx.errors import CaptureError
from biofx.layers.single_weight import LOOKUP_KINDS
from biofx.model.graph_module import BioGraphModule
from biofx.operators.rate_sampling import Distribution
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.report import Report

_BY_WEIGHT = frozenset({"mask-weights", "scale-gradients", "fold-splits"})
"""Passes that look at each weight by itself, or at what the part itself has."""
_BY_NEIGHBOURS = frozenset({"split-weights", "constrain-signs"})
"""Passes that ask what feeds a layer, and what follows it."""


@dataclass(frozen=True)
class Ends:
    """The layers at the ends of a part, of which the part does not say what lies beyond."""

    fed_from_outside: frozenset[str]
    """Nodes that read units of which the part does not say where they come from."""
    last: frozenset[str]
    """Nodes with no weights between them and the end of the part."""


def ends_of(graph_module: BioGraphModule, compilation: Compilation) -> Ends:
    """Return the layers at the ends of a part; none where it ends as the model does.

    Args:
        graph_module: the part, before any pass.
        compilation: what it is a part of.
    """
    fed, last = set(), set()
    if compilation.begins_late:
        groups = unit_groups(graph_module)
        for reading in groups.readings:
            kinds = {source.kind for source in groups.sources_of(reading.units).sources}
            if reading.site.kind not in LOOKUP_KINDS and not kinds <= {"layer", "constant"}:
                fed.add(reading.site.node.name)
    if compilation.ends_early:
        last = {node.name for node in readout_nodes(graph_module)}
    return Ends(frozenset(fed), frozenset(last))


def refuse_crossing(pipeline: Pipeline, report: Report, ends: Ends, compilation: Compilation) -> None:
    """Refuse what passes cannot know of a part.

    Raises:
        CaptureError: a pass needs the whole model, or a layer that it is meant for lies at an end.
    """
    if compilation.is_whole:
        return
    for entry in _innermost(pipeline):
        if reason := _why_whole(entry):
            _refuse(compilation, f"{entry.name} {reason}", "Leave the pass out")
    for done in report.passes:
        if done.name not in _BY_NEIGHBOURS:
            continue
        said = [remark for remark in done.remarks if remark.reason != "off" and remark.node is not None]
        for names, what in ((ends.fed_from_outside, "what feeds"), (ends.last, "what follows")):
            layers = [remark.layer for remark in said if remark.node in names]
            if layers:
                shown = ", ".join(map(repr, dict.fromkeys(layers)))
                _refuse(
                    compilation,
                    f"{done.name} must know {what} {shown}, which lies in another part",
                    f"Leave these layers out, exclude={list(dict.fromkeys(layers))}",
                )


def _why_whole(entry: Pass) -> str:
    """Return why a pass needs the whole model, empty if it does not."""
    variants = [dict(override.options) for override in entry.overrides]

    def values(name: str) -> list[object]:
        return [getattr(entry, name), *(given[name] for given in variants if name in given)]

    if entry.name == "scale-gradients" and Distribution.LAYER_ADAPTIVE in values("distribution"):
        return "with layer-adaptive factors must know the place of each layer in the whole model"
    if entry.name == "mask-weights" and False in values("self_connections"):
        return "must know which units a weight reads to leave out self-connections"
    known = entry.name in _BY_WEIGHT | _BY_NEIGHBOURS
    return "" if known else "must see the whole model"


def _innermost(entry: Pass) -> Iterator[Pass]:
    if not isinstance(entry, Pipeline):
        yield entry
        return
    for member in entry.passes:
        yield from _innermost(member)


def _refuse(compilation: Compilation, needs: str, without: str) -> None:
    cuts = [*filter(None, dict.fromkeys((compilation.begins_late, compilation.ends_early)))]
    raise CaptureError(
        f"{needs}; the compiler has cut {type(compilation.model).__name__} in parts: {'; '.join(cuts)}. "
        f"{without}; or remove the cut, which torch.compile(…, fullgraph=True) names; or let biofx see the "
        "whole: torch.compile(biofx.transform(model, config).graph_module)"
    )
