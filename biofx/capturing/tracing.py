"""Symbolic tracing of a module, whole or with the parts left out that cannot be traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph

from biofx.capturing.model_tracer import TOUCHES_STATE, ModelTracer, StartAgain
from biofx.capturing.side_effects import Watch
from biofx.capturing.state_of_others import Unknowns
from biofx.errors import CaptureError


@dataclass(frozen=True)
class Traced:
    """The graph of a module, and what it calls as a whole because it could not be traced."""

    graph: Graph
    kept: Mapping[str, str]
    """Paths of those modules, and why each is not part of the graph."""


def trace(
    root: nn.Module,
    opaque: frozenset[str] = frozenset(),
    foreign: frozenset[int] = frozenset(),
    *,
    prefix: str = "",
    keep: bool = False,
) -> Traced:
    """Trace a module's forward.

    Args:
        root: the module; what its forward leaves behind in it is found and refused.
        opaque: paths of modules that become one call each.
        foreign: ids of tensors that must not find their way into the graph.
        prefix: path of ``root`` itself, for messages.
        keep: let modules inside ``root`` that cannot be traced become one call each, instead of refusing.

    Raises:
        CaptureError: the forward cannot be captured without losing something.
    """
    watch = Watch(root, prefix)
    kept: dict[str, str] = {}
    while True:
        tracer = ModelTracer(root, opaque, foreign, prefix, dict(kept) if keep else None, watch)
        try:
            graph = _traced(tracer, root)
            found = kept | (tracer.kept or {})
            left_in = watch.changed_modules()
            if keep:
                changed = [path for path in left_in if path and path not in found]
                found |= {
                    path: f"{tracer.named(path)} changes its attributes in the forward" for path in changed
                }
            if found == kept:  # those that are kept did not run
                watch.refuse_side_effects(attributes=bool(left_in))
                again = _without_state_of_others(root, opaque, foreign, prefix, kept, watch, graph)
                if again == kept:
                    return Traced(graph, kept)
                found = again
            kept = found
        except StartAgain as again_from:
            kept |= again_from.kept
        except CaptureError:
            if keep:
                watch.restore()
            raise
        watch.restore()


def _without_state_of_others(
    root: nn.Module,
    opaque: frozenset[str],
    foreign: frozenset[int],
    prefix: str,
    kept: dict[str, str],
    watch: Watch,
    graph: Graph,
) -> dict[str, str]:
    """Trace again without the state of those modules that are kept; return which ones are to be kept then.

    Raises:
        CaptureError: the forward of ``root`` itself touches such state.
    """
    unknowns = Unknowns(root, (*kept, *opaque))
    with unknowns.in_place() as are_some:
        if not are_some:
            return kept
        tracer = ModelTracer(root, opaque, foreign, prefix, dict(kept), watch, unknowns)
        try:
            found = _traced(tracer, root)
        except StartAgain as again:
            return again.kept
        if unknowns.are_touched() or str(found) != str(graph):
            raise CaptureError(f"{tracer.named('')} {TOUCHES_STATE}")
    return kept


def _traced(tracer: ModelTracer, root: nn.Module) -> Graph:
    try:
        with tracer.recording():
            graph = tracer.trace(root)
    except CaptureError as error:
        raise (tracer.refusals or [error])[0] from None
    except Exception as error:
        if tracer.refusals:
            raise tracer.refusals[0] from error
        raise tracer.refusal_of(error) from error
    if tracer.refusals:
        raise tracer.refusals[0]
    return graph
