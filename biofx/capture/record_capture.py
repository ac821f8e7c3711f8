"""Capture from example inputs: record both modes, unify them, and check the result before it is returned."""

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
from biofx.capture.graph_breaks import GraphBreak
from biofx.capture.python_reads import show_parameters_read_by_python
from biofx.capture.region_capture import capture_regions, capture_uncalled, is_leaf
from biofx.capture.side_effects import Watch
from biofx.capture.trials import DifferentialCheck, TrialModel, cloned
from biofx.errors import CaptureError, InputError
from biofx.graph.graph_functions import eager_forward_graph
from biofx.graph.regions import innermost_around, is_inside, joined_path
from biofx.layers.weight_site import weight_blocker
from biofx.model.copies import deep_copy
from biofx.model.graph_module import BioGraphModule, become_graph_module
from biofx.model.modes import switch_mode, switches_of


def capture_recorded(
    root: nn.Module, example_inputs: ExampleInputs, opaque: frozenset[str], foreign: frozenset[int]
) -> BioGraphModule:
    """Turn a model, in place, into a graph module by recording what it does on example inputs.

    Args:
        root: the model, a copy made for this.
        example_inputs: inputs of one call (see :func:`biofx.capture.example_inputs.as_call`).
        opaque: paths of modules not to look into.
        foreign: ids of tensors of the original, which must not be in a graph.

    Raises:
        InputError: the example inputs are not of that form, or the model fails on them.
        CaptureError: not even regions can be captured.
    """
    return _RecordCapture(root, as_call(root, example_inputs), opaque, foreign).captured()


class _RecordCapture:
    def __init__(
        self,
        root: nn.Module,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        opaque: frozenset[str],
        foreign: frozenset[int],
    ) -> None:
        self._root = root
        self._given = given
        self._switches = switches_of(root)
        self._opaque = opaque | self._switches.rebuilt
        self._foreign = foreign
        self._modules = dict(root.named_modules())
        self._breaks: dict[str, str] = {}
        """Paths of the modules at which the graph breaks, and why."""
        self._by_class: set[str] = set()
        """Those of them that are there only because it breaks at another module of the class."""
        self._most = len(self._modules)
        self._breaks_at_classes = True
        self._queries_sizes = True
        self._spare: TrialModel | None = None
        self._has_scripts = any(isinstance(m, torch.jit.ScriptModule) for m in self._modules.values())
        self._own = {id(p): p for p in root.parameters()}
        # all trial runs share them: a forward may write into its parameters
        self._scratch = {id(p): copy.deepcopy(p) for p in root.parameters()}
        self._check = DifferentialCheck(root, given, self._copy, lambda: self._borrowed().model)
        self._on_meta = any(tensor.is_meta for tensor in (*root.parameters(), *root.buffers()))

    def captured(self) -> BioGraphModule:
        """Record until the result does what the model does; trace symbolically if that fails."""
        if "" in self._opaque:
            return self._traced()
        try:
            made = self._checked()
        except InputError:
            if not self._on_meta and not self._check.works_in_a_mode():
                raise
            return self._traced()  # it needs values on meta, or works in one mode only, as one with labels
        except CaptureError:
            return self._traced()
        with_parameters = [p for p in self._by_class if next(self._modules[p].parameters(), None) is not None]
        return (self._with_fewer_breaks() if with_parameters else None) or made

    def _checked(self) -> BioGraphModule:
        """Record, with a further graph break each time the result does not do what the model does."""
        while True:
            recorded = self._recorded()
            made = self._assembled(deep_copy(self._root, dict(self._own)), recorded)
            found = self._graph_break(made)
            self._check_parameters()
            if found is None:
                return made
            if found.path in self._breaks:
                region = self._check.region_that_differs(made, made.region_paths)
                found = GraphBreak(region or "", found.reason)
            self._break_at(found)

    def _graph_break(self, made: nn.Module) -> GraphBreak | None:
        if self._on_meta:
            return None
        return self._check.graph_break(made, queries_sizes=self._queries_sizes)

    def _with_fewer_breaks(self) -> BioGraphModule | None:
        """Record without the breaks that are there only because of a class; None if that fails."""
        self._breaks_at_classes = False
        for path in self._by_class:
            del self._breaks[path]
        self._most = len(self._breaks)
        try:
            return self._checked()
        except (InputError, CaptureError):
            return None

    def _traced(self) -> BioGraphModule:
        """Trace the model symbolically, and check the result on the example.

        Raises:
            CaptureError: it does not do what the model does, which does the same at every call.
        """
        copied = deep_copy(self._root, dict(self._own))
        made = capture_regions(copied, self._opaque, self._foreign, ", and it could not be recorded")
        found = self._graph_break(made)
        if found is not None and self._graph_break(self._root) is None:
            raise CaptureError(
                f"{found.reason}. A part of the model may be reached past its call, by hooks that the first "
                "call installs, say: name the modules that have them in opaque=[…]"
            )
        return made

    def _copy(self, model: nn.Module) -> Any:
        """Return a copy for a trial run; a model that is switched by code of its own shares no parameter."""
        return deep_copy(model, {} if self._switches.are_some else dict(self._scratch))

    def _borrowed(self) -> TrialModel:
        """Return a copy of the model for one run."""
        trial, self._spare = self._spare, None
        if trial is None:
            return TrialModel(self._copy(self._root))
        trial.restore()
        return trial

    def _give_back(self, trial: TrialModel) -> None:
        """Keep a copy for the next run, if the last one can have changed nothing but tensors."""
        alone = self._switches.are_some
        if not self._breaks and not self._opaque and not self._has_scripts and not alone:
            self._spare = trial

    def _check_parameters(self) -> None:
        for key, parameter in self._own.items() if not self._switches.are_some else ():
            tried = self._scratch[key]
            if parameter.is_meta or weight_blocker(parameter) is not None:
                continue  # it has no values, or values that cannot be compared
            if torch.equal(tried, parameter):
                continue
            if not torch.allclose(tried, parameter, rtol=0, atol=0, equal_nan=True):
                raise CaptureError("the model's forward writes into its parameters")

    def _recorded(self) -> _Recorded:
        """Record both modes with the same graph breaks."""
        runs: dict[bool, EagerTracer] = {}
        while True:
            try:
                for training in (True, False):
                    if training not in runs:
                        tracer = self._run(training)
                        runs = {} if tracer.found else runs
                        if tracer.is_stale:
                            break
                        runs[training] = tracer
                if len(runs) == 2:
                    # what a forward queries in Python is not noticed
                    self._queries_sizes = bool(self._breaks) or any(run.asks_sizes for run in runs.values())
                    return self._unified(runs[True], runs[False])
            except GraphBreak as found:
                self._break_at(found)
                runs.clear()

    def _break_at(self, found: GraphBreak) -> None:
        if found.path in self._breaks:
            raise CaptureError(found.reason)
        self._breaks[found.path] = found.reason
        if len(self._breaks) > self._most:
            raise CaptureError(found.reason)
        kind = type(self._modules[found.path])
        # modules of one class mostly break in one way, which saves recording again for each
        for path, module in self._modules.items() if self._breaks_at_classes or found.all_alike else ():
            if path and found.path and type(module) is kind and path not in self._breaks:
                self._breaks[path] = f"as {found.path!r}, which is a {kind.__name__} too: {found.reason}"
                if not found.all_alike:
                    self._by_class.add(path)

    def _run(self, training: bool) -> EagerTracer:
        """Record one run of a copy."""
        trial = self._borrowed()
        model = switch_mode(trial.model, training)
        for module in model.modules() if self._switches.are_some else ():
            if not is_leaf(module):  # which reads its own flag, and does so in the graph too
                module.training = training
        watch = Watch(model)
        tracer = EagerTracer(model, dict(self._breaks), self._opaque, self._switches)
        args, kwargs = cloned(self._given)
        try:
            tracer.run(args, kwargs)
        except InputError as error:
            self._refuse_inputs(training, error)
            raise GraphBreak(tracer.failed_in, f"cannot be recorded: {error.__cause__}") from None
        self._breaks |= tracer.found
        watch.allowed = tracer.assigned
        left_in = watch.changed_modules()
        changed = [path for path in left_in if path not in self._breaks]
        if changed:
            for path in changed[1:] if changed[0] else ():
                self._breaks[path] = f"module {path!r} changes its attributes in the forward"
            raise GraphBreak(changed[0], f"module {changed[0]!r} changes its attributes in the forward")
        if "" not in self._breaks:
            try:
                watch.refuse_side_effects(torch_draws=True, attributes=bool(left_in))
            except CaptureError as error:
                raise GraphBreak("", str(error)) from None
        if not left_in:
            self._give_back(trial)
        return tracer

    def _refuse_inputs(self, training: bool, error: InputError) -> None:
        """Raise an error of a recorded run if the model fails without being recorded too."""
        model = self._copy(self._root)
        args, kwargs = cloned(self._given)
        try:
            switch_mode(model, training)(*args, **kwargs)
        except Exception:
            raise error from error.__cause__

    def _unified(self, training: EagerTracer, evaluation: EagerTracer) -> _Recorded:
        graphs: dict[str, Graph] = {}
        paths = dict.fromkeys([*training.graphs, *evaluation.graphs])
        for path in sorted(paths, key=len):  # a module that decides on a call comes before the one it calls
            found = [tracer.graphs.get(path, []) for tracer in (training, evaluation)]
            if not all(found):
                raise GraphBreak(path, f"module {path!r} is called in one mode only")
            for calls in found:
                if any(str(call) != str(calls[0]) for call in calls):
                    raise GraphBreak(path, f"module {path!r} does not do the same at every call")
            modes = [_one_mode(tracer, path, self._breaks) for tracer in (training, evaluation)]
            graphs[path] = unified(path, self._modules[path], *modes)
        layers = list(dict.fromkeys([*training.layers, *evaluation.layers]))
        graphs = {path: graphs[path] for path in paths}
        reads = {path: [*training.reads.get(path, ()), *evaluation.reads.get(path, ())] for path in graphs}
        return _Recorded(graphs, layers, {*training.calls, *evaluation.calls}, reads)

    def _assembled(self, root: nn.Module, recorded: _Recorded) -> BioGraphModule:
        """Turn a copy of the model, in place, into a graph module with the graphs that were recorded."""
        graphs, called = recorded.graphs, recorded.called
        modules = dict(root.named_modules())
        breaks = {path: reason for path, reason in self._breaks.items() if path in called or not path}
        regions = [path for path in graphs if path]
        for path in regions:
            region = become_graph_module(modules[path], graphs[path])
            guard_reads(region, graphs[path], recorded.reads[path], self._switches, path)
        done = [
            inner
            for path in regions
            for name, inner in modules[path].named_modules()
            if not any(_is_between(path, around, joined_path(path, name)) for around in breaks)
        ]
        done += [modules[path] for path in called | set(breaks)]
        rest = capture_uncalled(root, self._opaque, self._foreign, breaks, done, self._switches)
        made = become_graph_module(root, graphs.get("") or eager_forward_graph())
        guard_reads(made, made.graph, recorded.reads.get("", ()), self._switches)
        made.graph_breaks = breaks | rest.graph_breaks
        made.region_paths = (*regions, *recorded.layers, *rest.regions)
        show_parameters_read_by_python(made)
        return made


@dataclass(frozen=True)
class _Recorded:
    """What was recorded in both modes."""

    graphs: dict[str, Graph]
    layers: list[str]
    """Paths of the layers that Python calls."""
    called: set[str]
    """Paths of the modules that were called."""
    reads: dict[str, list[Read]]
    """What the forward behind each graph read from attributes."""


def _one_mode(tracer: EagerTracer, path: str, breaks: Iterable[str]) -> OneMode:
    """Return what one module did in the mode that was recorded, with paths in the module."""
    start = len(path) + bool(path)
    around = [module for module in breaks if module != path and is_inside(module, path)]
    asks = [
        (running[start:], asked[start:])
        for running, asked in tracer.asks
        if is_inside(running, path) and innermost_around(running, around) is None
    ]
    paths = frozenset(asked for _, asked in asks)
    calls = {called[start:]: times for called, times in tracer.calls.items() if is_inside(called, path)}
    is_alone = len(paths) == 1 and all(is_inside(asked, path) for _, asked in tracer.asks)
    is_known = all(running == asked for running, asked in asks) or is_alone
    return OneMode(tracer.graphs[path][0], paths if is_known else None, calls)


def _is_between(region: str, module: str, path: str) -> bool:
    """Whether a module of a region is inside another of its modules, at which the graph breaks."""
    return is_inside(module, region) and is_inside(path, module)
