"""Symbolic tracing of a module, whole or with the parts left out that cannot be traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph

from biofx.capturing.model_tracer import ModelTracer, StartAgain
from biofx.capturing.side_effects import Watch
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
            kept |= tracer.kept or {}
            left_in = watch.changed_modules()
            changed = [path for path in left_in if path and path not in kept]
            if not keep or not changed:
                watch.refuse_side_effects(attributes=bool(left_in))
                return Traced(graph, kept)
            for path in changed:
                kept[path] = f"{tracer.named(path)} changes its attributes in the forward"
        except StartAgain as again:
            kept |= again.kept
        except CaptureError:
            if keep:
                watch.restore()
            raise
        watch.restore()


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
