"""Capture from example inputs: record, unify the modes, and try the result before trusting it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from biofx.capture.attribute_reads import Read, guard_reads
from biofx.capture.both_modes import OneMode, unified
from biofx.capture.eager_tracer import EagerTracer
from biofx.capture.example_inputs import ExampleInputs, as_call
from biofx.capture.graph_breaks import GraphBreak, joined_path
from biofx.capture.mode_switches import switches_of
from biofx.capture.python_reads import modules_that_read
from biofx.capture.region_capture import capture_regions, capture_uncalled, is_leaf, weights_read_by_python
from biofx.capture.rehearsal import Rehearsal
from biofx.capture.side_effects import Watch
from biofx.capture.trials import Trials, cloned
from biofx.errors import CaptureError, InputError
from biofx.graph.graph_functions import eager_forward_graph
from biofx.graph.regions import innermost_around, is_inside
from biofx.layers.unusual_weights import obstacle_to_values
from biofx.model.copies import deep_copy
from biofx.model.graph_module import BioGraphModule, become_graph_module
from biofx.model.modes import switch_mode


def capture_recorded(
    root: nn.Module, example_inputs: ExampleInputs, opaque: frozenset[str], foreign: frozenset[int]
) -> BioGraphModule:
    """Turn a model, in place, into a graph module by recording what it does on example inputs.

    Args:
        root: the model, made for this.
        example_inputs: of one call (see :func:`biofx.capture.example_inputs.as_call`).
        opaque: paths of modules not to look into.
        foreign: ids of tensors that must not find their way into a graph.

    Raises:
        InputError: the example inputs are not of that form, or the model fails on them.
        CaptureError: not even regions can be captured.
    """
    args, kwargs = as_call(root, example_inputs)
    front_end = _RecordCapture(root, args, kwargs, opaque, foreign)
    return front_end.captured()


class _RecordCapture:
    def __init__(
        self,
        root: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        opaque: frozenset[str],
        foreign: frozenset[int],
    ) -> None:
        self._root = root
        self._given = args, kwargs
        self._switches = switches_of(root)
        self._opaque = opaque | self._switches.rebuilt
        self._foreign = foreign
        self._modules = dict(root.named_modules())
        self._kept: dict[str, str] = {}
        self._by_class: set[str] = set()
        self._most = len(self._modules)
        self._is_hasty = True
        self._spare: Rehearsal | None = None
        self._has_scripts = any(isinstance(m, torch.jit.ScriptModule) for m in self._modules.values())
        self._asks_sizes = True
        self._own = {id(p): p for p in root.parameters()}
        # for all trial runs: a forward may write into its parameters
        self._scratch = {id(p): copy.deepcopy(p) for p in root.parameters()}
        self._trials = Trials(root, self._given, self._copy, lambda: self._borrowed().model)
        self._on_meta = any(tensor.is_meta for tensor in (*root.parameters(), *root.buffers()))

    def captured(self) -> BioGraphModule:
        """Record until it holds."""
        made: BioGraphModule | None
        if "" in self._opaque:  # nothing in it is to be looked into
            return self._traced()
        try:
            made = self._held()
        except InputError:
            if not self._on_meta and not self._trials.works_in_a_mode():
                raise
            made = None  # it asks for values, and has none; or wants labels in training, none in evaluation
        except CaptureError:  # it cannot be recorded at all
            made = None
        if made is None:
            return self._traced()
        may_show_more = any(
            next(self._modules[path].parameters(), None) is not None for path in self._by_class
        )
        return (self._with_less_kept() if may_show_more else None) or made

    def _held(self) -> BioGraphModule:
        """Record until it does what the model does."""
        while True:
            recorded = self._recorded()
            made = self._assembled(deep_copy(self._root, dict(self._own)), recorded)
            doubt = None if self._on_meta else self._trials.doubt(made, asks_sizes=self._asks_sizes)
            self._check_parameters()
            if doubt is None:
                return made
            self._keep(doubt if doubt.path not in self._kept else GraphBreak("", doubt.reason))

    def _with_less_kept(self) -> BioGraphModule | None:
        """Try without what is kept only because another of its class is; None if that fails."""
        self._is_hasty = False
        for path in self._by_class:
            del self._kept[path]
        self._most = len(self._kept)
        try:
            return self._held()
        except (InputError, CaptureError):
            return None

    def _traced(self) -> BioGraphModule:
        """Capture without the example, and try the result on it.

        Raises:
            CaptureError: it does something else than the model, which does the same every time.
        """
        copied = deep_copy(self._root, dict(self._own))
        made = capture_regions(copied, self._opaque, self._foreign)
        doubt = None if self._on_meta else self._trials.doubt(made, asks_sizes=self._asks_sizes)
        if doubt is not None and self._trials.doubt(self._root, asks_sizes=self._asks_sizes) is None:
            raise CaptureError(
                f"{doubt.reason}. A part of the model may be reached past its call, by hooks that the first "
                "call installs, say: name the modules that have them in opaque=[…]"
            )
        return made

    def _copy(self, model: nn.Module) -> Any:
        """Return a copy to try something on; one that is switched by code of its own has all to itself."""
        return deep_copy(model, {} if self._switches.are_some else dict(self._scratch))

    def _borrowed(self) -> Rehearsal:
        """Return a copy to run, as the model is."""
        rehearsal, self._spare = self._spare, None
        if rehearsal is None:
            return Rehearsal(self._copy(self._root))
        rehearsal.put_back()
        return rehearsal

    def _give_back(self, rehearsal: Rehearsal) -> None:
        """Keep a copy for the next run, where all that the last one changed is known to be tensors."""
        alone = self._switches.are_some
        if not self._kept and not self._opaque and not self._has_scripts and not alone:
            self._spare = rehearsal

    def _check_parameters(self) -> None:
        for key, parameter in self._own.items() if not self._switches.are_some else ():
            tried = self._scratch[key]
            if parameter.is_meta or obstacle_to_values(parameter) is not None:
                continue  # it has no values, or such as cannot be compared
            if torch.equal(tried, parameter):
                continue
            if not torch.allclose(tried, parameter, rtol=0, atol=0, equal_nan=True):
                raise CaptureError("the model's forward writes into its parameters")

    def _recorded(self) -> _Recorded:
        runs: dict[bool, EagerTracer] = {}
        while True:
            try:
                for training in (True, False):
                    if training not in runs:
                        recorder = self._run(training)
                        # what both hold must be recorded with the same modules kept
                        runs = {} if recorder.found else runs
                        if recorder.is_stale:
                            break
                        runs[training] = recorder
                if len(runs) == 2:
                    asked = any(recorder.asks_sizes for recorder in runs.values())
                    self._asks_sizes = asked or bool(self._kept)  # in Python it is not noticed
                    return self._unified(runs[True], runs[False])
            except GraphBreak as found:
                self._keep(found)
                runs.clear()

    def _keep(self, found: GraphBreak) -> None:
        if found.path in self._kept:
            raise CaptureError(found.reason)
        self._kept[found.path] = found.reason
        if len(self._kept) > self._most:
            raise CaptureError(found.reason)
        alike = type(self._modules[found.path])
        for path, module in self._modules.items() if self._is_hasty or found.all_alike else ():
            # modules of one class mostly differ in one way: that saves recording anew for each
            if path and found.path and type(module) is alike and path not in self._kept:
                self._kept[path] = f"as {found.path!r}, which is a {alike.__name__} too: {found.reason}"
                if not found.all_alike:
                    self._by_class.add(path)

    def _run(self, training: bool) -> EagerTracer:
        """Record one run, on a copy, so that nothing of it stays."""
        rehearsal = self._borrowed()
        model = switch_mode(rehearsal.model, training)
        for module in model.modules() if self._switches.are_some else ():
            if not is_leaf(module):  # whose forward asks, and goes on asking, how its own flag is
                module.training = training
        watch = Watch(model)
        recorder = EagerTracer(model, dict(self._kept), self._opaque, self._switches)
        args, kwargs = cloned(self._given)
        try:
            recorder.run(args, kwargs)
        except InputError as error:
            self._refuse_inputs(training, error)
            raise GraphBreak(recorder.failed_in, f"cannot be recorded: {error.__cause__}") from None
        self._kept |= recorder.found
        watch.allowed = recorder.assigned
        left_in = watch.changed_modules()
        changed = [path for path in left_in if path not in self._kept]
        if changed:
            for path in changed[1:] if changed[0] else ():
                self._kept[path] = f"module {path!r} changes its attributes in the forward"
            raise GraphBreak(changed[0], f"module {changed[0]!r} changes its attributes in the forward")
        if "" not in self._kept:
            try:
                watch.refuse_side_effects(torch_draws=True, attributes=bool(left_in))
            except CaptureError as error:
                raise GraphBreak("", str(error)) from None
        if not left_in:
            self._give_back(rehearsal)
        return recorder

    def _refuse_inputs(self, training: bool, error: InputError) -> None:
        """Raise the error if it is the model's own, and not one of being recorded."""
        model = self._copy(self._root)
        args, kwargs = cloned(self._given)
        try:
            switch_mode(model, training)(*args, **kwargs)
        except Exception:
            raise error from error.__cause__

    def _unified(self, training: EagerTracer, evaluation: EagerTracer) -> _Recorded:
        graphs: dict[str, Graph] = {}
        paths = dict.fromkeys([*training.graphs, *evaluation.graphs])
        for path in sorted(paths, key=len):  # whoever decides how to call a module, ahead of that module
            found = [recorder.graphs.get(path, []) for recorder in (training, evaluation)]
            if not all(found):
                raise GraphBreak(path, f"module {path!r} is called in one mode only")
            for calls in found:
                if any(_text(call) != _text(calls[0]) for call in calls):
                    raise GraphBreak(path, f"module {path!r} does not do the same at every call")
            modes = [_one_mode(recorder, path, self._kept) for recorder in (training, evaluation)]
            graphs[path] = unified(path, self._modules[path], *modes)
        layers = list(dict.fromkeys([*training.layers, *evaluation.layers]))
        graphs = {path: graphs[path] for path in paths}
        reads = {path: [*training.reads.get(path, ()), *evaluation.reads.get(path, ())] for path in graphs}
        return _Recorded(graphs, layers, {*training.calls, *evaluation.calls}, reads)

    def _assembled(self, root: nn.Module, recorded: _Recorded) -> BioGraphModule:
        graphs, layers, called = recorded.graphs, recorded.layers, recorded.called
        modules = dict(root.named_modules())
        kept = {path: reason for path, reason in self._kept.items() if path in called or not path}
        regions = [path for path in graphs if path]
        for path in regions:
            region = become_graph_module(modules[path], graphs[path])
            guard_reads(region, graphs[path], recorded.reads[path], self._switches, path)
        settled = [
            inner
            for path in regions
            for name, inner in modules[path].named_modules()
            if not any(_is_between(path, around, joined_path(path, name)) for around in kept)
        ]
        settled += [modules[path] for path in called | set(kept)]
        rest = capture_uncalled(root, self._opaque, self._foreign, kept, settled, self._switches)
        made = become_graph_module(root, graphs.get("") or eager_forward_graph())
        guard_reads(made, made.graph, recorded.reads.get("", ()), self._switches)
        made.graph_breaks = kept | rest.kept
        made.region_paths = (*regions, *layers, *rest.regions, *modules_that_read(made))
        made.read_by_python = weights_read_by_python(made)
        return made


@dataclass(frozen=True)
class _Recorded:
    """What runs in both modes have come to."""

    graphs: dict[str, Graph]
    layers: list[str]
    """Paths of the layers that Python calls."""
    called: set[str]
    """Paths of the modules that were called."""
    reads: dict[str, list[Read]]
    """What the forward behind each graph read from attributes."""


def _one_mode(recorder: EagerTracer, path: str, kept: Iterable[str]) -> OneMode:
    """Return what one module did in the mode that was recorded, in its own paths."""
    inside = len(path) + bool(path)
    around = [module for module in kept if module != path and is_inside(module, path)]
    asks = [
        (running[inside:], asked[inside:])
        for running, asked in recorder.asks
        if is_inside(running, path) and innermost_around(running, around) is None
    ]
    paths = frozenset(asked for _, asked in asks)
    calls = {called[inside:]: times for called, times in recorder.calls.items() if is_inside(called, path)}
    is_alone = len(paths) == 1 and all(is_inside(asked, path) for _, asked in recorder.asks)
    is_known = all(running == asked for running, asked in asks) or is_alone
    return OneMode(recorder.graphs[path][0], paths if is_known else None, calls)


def _is_between(region: str, kept: str, path: str) -> bool:
    """Whether a module of a region is inside one that keeps its own forward, which is in the region."""
    return is_inside(kept, region) and is_inside(path, kept)


def _text(graph: Graph) -> str:
    return str(graph)
