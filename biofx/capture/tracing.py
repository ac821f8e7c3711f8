"""Symbolic tracing of a module, whole or with the parts left out that cannot be traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph

from biofx.capture.both_modes import OneMode, unified
from biofx.capture.frames import GraphBreak
from biofx.capture.mode_switches import REBUILT, ModeSwitches
from biofx.capture.model_tracer import TOUCHES_STATE, ModelTracer, StartAgain
from biofx.capture.read_log import Read
from biofx.capture.side_effects import Watch
from biofx.capture.state_of_others import Unknowns
from biofx.errors import CaptureError
from biofx.graph.regions import innermost_around


@dataclass(frozen=True)
class Traced:
    """The graph of a module, and what it calls as a whole because it could not be traced."""

    graph: Graph
    kept: Mapping[str, str]
    """Paths of those modules, and why each is not part of the graph."""
    reads: tuple[Read, ...] = ()
    """What the forward read from attributes."""


def trace(
    root: nn.Module,
    opaque: frozenset[str] = frozenset(),
    foreign: frozenset[int] = frozenset(),
    *,
    prefix: str = "",
    keep: bool = False,
    mode_switches: ModeSwitches | None = None,
) -> Traced:
    """Trace a module's forward.

    Args:
        root: the module; what its forward leaves behind in it is found and refused.
        opaque: paths of modules that become one call each.
        foreign: ids of tensors that must not find their way into the graph.
        prefix: path of ``root`` itself, for messages.
        keep: let modules inside ``root`` that cannot be traced become one call each, instead of refusing.
        mode_switches: what train() and eval() change in ``root``.

    Raises:
        CaptureError: the forward cannot be captured without losing something.
    """
    mode_switches = mode_switches or ModeSwitches()
    if "" in mode_switches.rebuilt:
        raise CaptureError(f"{f'module {prefix!r}' if prefix else 'the model'} {REBUILT}")
    tracing = _Tracing(root, opaque | mode_switches.rebuilt, foreign, prefix, keep, mode_switches)
    found: Traced | None = None
    try:
        mode = tracing.in_mode(None)
        found = Traced(mode.graph, dict(tracing.kept), mode.reads)
    except CaptureError as error:
        refusal = error
    if tracing.decides_by_mode:
        found = tracing.in_both_modes() or found
    if found is None:
        raise refusal
    return found


class _Tracing:
    """Traces one module as often as it takes."""

    def __init__(
        self,
        root: nn.Module,
        opaque: frozenset[str],
        foreign: frozenset[int],
        prefix: str,
        keep: bool,
        mode_switches: ModeSwitches,
    ) -> None:
        self._mode_switches = mode_switches
        self._root = root
        self._opaque = opaque
        self._foreign = foreign
        self._prefix = prefix
        self._keep = keep
        self._watch = Watch(root, prefix)
        self.kept: dict[str, str] = {}
        self.decides_by_mode = False

    def in_both_modes(self) -> Traced | None:
        """Return one graph for training and evaluation, None where they cannot be one."""
        self.kept = {}
        while True:
            try:
                training = self.in_mode(True)
                settled = set(self.kept)
                evaluation = self.in_mode(False)
                if settled == set(self.kept):
                    graph = unified(self._prefix, self._root, training, evaluation)
                    return Traced(graph, self.kept, training.reads + evaluation.reads)
            except CaptureError:
                return None
            except GraphBreak as found:
                local = found.path[len(self._prefix) :].lstrip(".")
                if not self._keep or local in ("", *self.kept):
                    return None
                self.kept[local] = found.reason

    def in_mode(self, mode: bool | None) -> OneMode:
        """Trace the forward, as it is in one mode or as it is in any.

        Raises:
            CaptureError: the forward cannot be captured without losing something.
        """
        while True:
            tracer = self._tracer(mode)
            try:
                graph = _traced(tracer, self._root)
                found = self.kept | (tracer.kept or {})
                left_in = self._watch.changed_modules()
                if self._keep:
                    changed = [path for path in left_in if path and path not in found]
                    reason = "changes its attributes in the forward"
                    found |= {path: f"{tracer.named(path)} {reason}" for path in changed}
                if found == self.kept:  # those that are kept did not run
                    self._watch.refuse_side_effects(attributes=bool(left_in))
                    found = self._kept_without_state_of_others(mode, graph)
                    if found == self.kept:
                        return self._one_mode(tracer, graph)
                self.kept = found
            except StartAgain as again:
                self.kept |= again.kept
            except CaptureError:
                self._watch.restore()
                raise
            finally:
                self.decides_by_mode |= any(tracer.has_parameters(path) for _, path in tracer.asks)
            self._watch.restore()

    def _tracer(self, mode: bool | None, unknowns: Unknowns | None = None) -> ModelTracer:
        kept = dict(self.kept) if self._keep else None
        return ModelTracer(
            self._root,
            self._opaque,
            self._foreign,
            self._prefix,
            kept,
            self._watch,
            mode,
            unknowns,
            self._mode_switches,
        )

    def _kept_without_state_of_others(self, mode: bool | None, graph: Graph) -> dict[str, str]:
        """Trace again without the state of the modules that are kept; return which are to be kept then.

        Raises:
            CaptureError: the forward itself touches such state.
        """
        unknowns = Unknowns(self._root, (*self.kept, *self._opaque))
        with unknowns.in_place() as are_some:
            if not are_some:
                return self.kept
            tracer = self._tracer(mode, unknowns)
            try:
                found = _traced(tracer, self._root)
            except StartAgain as again:
                return again.kept
            if unknowns.are_touched() or str(found) != str(graph):
                raise CaptureError(f"{tracer.named('')} {TOUCHES_STATE}")
        return self.kept

    def _one_mode(self, tracer: ModelTracer, graph: Graph) -> OneMode:
        asks = [
            (running, path) for running, path in tracer.asks if innermost_around(running, self.kept) is None
        ]
        own = frozenset(path for running, path in asks if running == path)
        asked = own if len(own) == len(asks) else None
        return OneMode(graph, asked, Counter(tracer.calls), tuple(tracer.log.reads))


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
