"""Symbolic tracing of a module, in one mode or both, restarted at each graph break.

A module at which tracing fails keeps its eager forward and becomes one call. It may keep state in its
attributes (the membrane potential of a spiking neuron) that the forward around it resets or returns. A graph
would do neither: while it is traced, the attribute holds its first value, which would be a constant. So a
last trace runs with such state hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn
from torch.fx import Graph

from biofx.capture.attribute_reads import Read
from biofx.capture.both_modes import OneMode, unified
from biofx.capture.bytecode import attributes_changed
from biofx.capture.graph_breaks import REBUILT, TOUCHES_STATE, GraphBreak, RestartTracing
from biofx.capture.intercepted_calls import replaced
from biofx.capture.side_effects import Watch
from biofx.capture.symbolic_tracer import SymbolicTracer
from biofx.errors import CaptureError
from biofx.graph.regions import innermost_around, joined_path
from biofx.model.modes import ModeSwitches


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
    assumed_length: int | None = None,
) -> Traced:
    """Trace a module's forward.

    Args:
        root: the module; what its forward leaves behind in it is found and refused.
        opaque: paths of modules that become one call each.
        foreign: ids of tensors that must not find their way into the graph.
        prefix: path of ``root`` itself, for messages.
        keep: let modules inside ``root`` that cannot be traced become one call each, instead of refusing.
        mode_switches: what train() and eval() change in ``root``.
        assumed_length: how often a loop over a value runs, in a graph for analysis alone; None to refuse it.

    Raises:
        CaptureError: the forward cannot be captured without losing something.
    """
    mode_switches = mode_switches or ModeSwitches()
    if "" in mode_switches.rebuilt:
        raise CaptureError(f"{f'module {prefix!r}' if prefix else 'the model'} {REBUILT}")
    tracing = _Tracing(
        root, opaque | mode_switches.rebuilt, foreign, prefix, keep, mode_switches, assumed_length
    )
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


@dataclass
class _Tracing:
    """Traces one module as often as it takes."""

    root: nn.Module
    opaque: frozenset[str]
    foreign: frozenset[int]
    prefix: str
    keep: bool
    mode_switches: ModeSwitches
    assumed_length: int | None = None
    kept: dict[str, str] = field(default_factory=dict)
    decides_by_mode: bool = False

    def __post_init__(self) -> None:
        self._watch = Watch(self.root, self.prefix)

    def in_both_modes(self) -> Traced | None:
        """Return one graph for training and evaluation, None where they cannot be one."""
        self.kept = {}
        while True:
            try:
                training = self.in_mode(True)
                kept_in_training = set(self.kept)
                evaluation = self.in_mode(False)
                if kept_in_training == set(self.kept):
                    graph = unified(self.prefix, self.root, training, evaluation)
                    return Traced(graph, self.kept, training.reads + evaluation.reads)
            except CaptureError:
                return None
            except GraphBreak as found:
                local = found.path[len(self.prefix) :].lstrip(".")
                if not self.keep or local in ("", *self.kept):
                    return None
                self.kept[local] = found.reason

    def in_mode(self, mode: bool | None) -> OneMode:
        """Trace the forward in one mode, or such that the graph is right in any.

        Raises:
            CaptureError: the forward cannot be captured without losing something.
        """
        while True:
            tracer = self._tracer(mode)
            try:
                graph = _traced(tracer, self.root)
                found = self.kept | (tracer.kept or {})
                left_in = self._watch.changed_modules()
                if self.keep:
                    changed = [path for path in left_in if path and path not in found]
                    reason = "changes its attributes in the forward"
                    found |= {path: f"{tracer.refusals.describe(path)} {reason}" for path in changed}
                if found == self.kept:  # those that are kept did not run
                    self._watch.refuse_side_effects(attributes=bool(left_in))
                    found = self._kept_with_hidden_states(mode, graph)
                    if found == self.kept:
                        return self._one_mode(tracer, graph)
                self.kept = found
            except RestartTracing as restart:
                self.kept |= restart.kept
            except CaptureError:
                self._watch.restore()
                raise
            finally:
                self.decides_by_mode |= any(tracer.has_parameters(path) for _, path in tracer.asks)
            self._watch.restore()

    def _tracer(self, mode: bool | None, touches_state: Callable[[], bool] | None = None) -> SymbolicTracer:
        return SymbolicTracer(
            self.root,
            self.opaque,
            self.foreign,
            self.prefix,
            dict(self.kept) if self.keep else None,
            self._watch,
            mode,
            touches_state,
            self.mode_switches,
            self.assumed_length,
        )

    def _kept_with_hidden_states(self, mode: bool | None, graph: Graph) -> dict[str, str]:
        """Trace again with the state of the kept modules hidden; return which are to be kept then.

        Raises:
            CaptureError: the forward itself touches such state.
        """
        hidden = _states_to_hide(self.root, (*self.kept, *self.opaque))
        if not hidden:
            return self.kept

        def touches_state() -> bool:
            return any(holder.get(name) is not state for holder, name, state in hidden)

        with replaced(hidden):
            tracer = self._tracer(mode, touches_state)
            try:
                found = _traced(tracer, self.root)
            except RestartTracing as restart:
                return restart.kept
            if touches_state() or str(found) != str(graph):
                raise CaptureError(f"{tracer.refusals.describe('')} {TOUCHES_STATE}")
        return self.kept

    def _one_mode(self, tracer: SymbolicTracer, graph: Graph) -> OneMode:
        asks = [
            (running, path) for running, path in tracer.asks if innermost_around(running, self.kept) is None
        ]
        own = frozenset(path for running, path in asks if running == path)
        asked = own if len(own) == len(asks) else None
        return OneMode(graph, asked, Counter(tracer.calls), tuple(tracer.log.reads))


def _traced(tracer: SymbolicTracer, root: nn.Module) -> Graph:
    refused = tracer.refusals.errors
    try:
        with tracer.tracing():
            graph = tracer.trace(root)
    except CaptureError as error:
        raise (refused or [error])[0] from None
    except Exception as error:
        raise (refused or [tracer.refusals.of(error)])[0] from error
    if refused:
        raise refused[0]
    return graph


class _HiddenState:
    """In the place of an attribute that changes at each call; refuses to be used."""

    def __init__(self, owner: str, name: str) -> None:
        vars(self)["_refusal"] = (
            f"uses attribute {name!r} of module {owner!r}, which keeps its eager forward and changes the "
            "attribute at each call; a graph would keep one value. Let the module return it"
        )

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CaptureError(vars(self)["_refusal"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise CaptureError("uses an attribute that a module with an eager forward changes at each call")

    def __getattr__(self, name: str) -> Any:
        self._refuse()


for _name in str.split(
    """bool call contains delitem enter float format getitem index int iter len setitem str
    abs neg pos invert eq ge gt le lt ne
    add and floordiv matmul mod mul or pow sub truediv xor
    radd rand rfloordiv rmatmul rmod rmul ror rpow rsub rtruediv rxor
    iadd iand ifloordiv imatmul imod imul ior ipow isub itruediv ixor"""
):
    setattr(_HiddenState, f"__{_name}__", _HiddenState._refuse)
_HiddenState.__hash__ = object.__hash__  # type: ignore[method-assign]


def _states_to_hide(root: nn.Module, whole: Iterable[str]) -> list[tuple[dict[str, Any], str, _HiddenState]]:
    """Return the attributes that modules may change in themselves: where each is, and what to put there.

    Args:
        root: the model.
        whole: paths of modules that become one call each.
    """
    found: dict[tuple[int, str], tuple[dict[str, Any], str, _HiddenState]] = {}
    for path in whole:
        for inner, module in root.get_submodule(path).named_modules():
            changed = attributes_changed(type(module)) - _TORCHS_OWN
            own = (value for name, value in vars(module).items() if name not in _TORCHS_OWN)
            for holder in (vars(module), *(value for value in own if type(value) is dict)):
                for name in changed & holder.keys():
                    hidden = _HiddenState(joined_path(path, inner), name)
                    found.setdefault((id(holder), name), (holder, name, hidden))
    return list(found.values())


_TORCHS_OWN = frozenset(vars(nn.Module()))
