"""Capture of a model with graph breaks: modules that can be traced become regions, the rest runs eagerly."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.fx import GraphModule, Tracer

from biofx.capture.attribute_reads import guard_reads
from biofx.capture.bytecode import (
    attributes_changed,
    names_mentioned,
)
from biofx.capture.python_reads import show_parameters_read_by_python
from biofx.capture.trace_module import Traced, trace
from biofx.errors import CaptureError
from biofx.graph.graph_functions import eager_forward_graph
from biofx.graph.regions import is_inside
from biofx.layers import LAYERS_OF_SEVERAL_INPUTS, dense_kind_of
from biofx.layers.attention import can_be_looked_into
from biofx.model.graph_module import BioGraphModule, become_graph_module, why_not_a_graph_module
from biofx.model.modes import ModeSwitches, switches_of


def capture_regions(
    root: nn.Module, opaque: frozenset[str], foreign: frozenset[int], advice: str = "; give example_inputs"
) -> BioGraphModule:
    """Turn a model, in place, into a graph module with as many regions as needed.

    Args:
        root: the model, a copy made for this.
        opaque: paths of modules not to look into.
        foreign: ids of tensors of the original, which must not be in a graph.
        advice: how a reason ends that an example of a call may help against.

    Raises:
        CaptureError: not even regions can be captured.
    """
    switches = switches_of(root)
    capture = RegionCapture(root, opaque | switches.rebuilt, foreign, switches, advice)
    traced = capture.traced_root()
    captured = become_graph_module(root, traced.graph)
    guard_reads(captured, traced.graph, traced.reads, switches)
    captured.graph_breaks = dict(capture.graph_breaks)
    captured.region_paths = tuple(capture.regions)
    show_parameters_read_by_python(captured)
    return captured


def capture_uncalled(
    root: nn.Module,
    opaque: frozenset[str],
    foreign: frozenset[int],
    graph_breaks: Iterable[str],
    done: Iterable[nn.Module],
    switches: ModeSwitches,
) -> RegionCapture:
    """Capture the modules that a run with example inputs has not called.

    Args:
        root: the model, a copy made for this; modules in it become graph modules.
        opaque: paths of modules not to look into.
        foreign: ids of tensors of the original, which must not be in a graph.
        graph_breaks: paths of the modules that run their eager forward.
        done: modules to leave unchanged.
        switches: what train() and eval() change.
    """
    capture = RegionCapture(root, opaque, foreign, switches, ", and the example inputs lead to no call of it")
    capture.seen |= set(map(id, done))
    for path in graph_breaks:
        capture.capture_children(path)
    return capture


class RegionCapture:
    """Captures the regions of a model one by one; the arguments are those of :func:`capture_regions`."""

    def __init__(
        self,
        root: nn.Module,
        opaque: frozenset[str],
        foreign: frozenset[int],
        switches: ModeSwitches,
        advice: str,
    ) -> None:
        self._advice = advice
        self._root = root
        self._switches = switches
        self._opaque = opaque
        self._foreign = foreign
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._first_paths = {id(module): path for path, module in root.named_modules()}
        self.seen: set[int] = {id(self._modules[path]) for path in opaque}
        # names that the eager forward around a module mentions, and attributes to which it may assign
        self._names: frozenset[str] = frozenset()
        self._changed: frozenset[str] = frozenset()
        self.regions: list[str] = []
        self.graph_breaks: dict[str, str] = {}

    def traced_root(self) -> Traced:
        """Return the graph of the model itself, after its regions are captured."""
        try:
            traced = trace(self._root, self._opaque, self._foreign, keep=True, mode_switches=self._switches)
        except CaptureError as error:
            self._break_at("", str(error))
            return Traced(eager_forward_graph(), {})
        self._break_inside("", traced.kept)
        return traced

    def _break_inside(self, path: str, kept: Mapping[str, str]) -> None:
        for inner, reason in kept.items():
            self._break_at(f"{path}.{inner}" if path else inner, reason)

    def _break_at(self, path: str, reason: str) -> None:
        """Let a module run its eager forward, and capture what it may call."""
        self.graph_breaks[path] = reason
        self.capture_children(path)

    def capture_children(self, path: str) -> None:
        """Capture what the module at a path may call."""
        if path in self._switches.rebuilt:
            return
        if path in self.graph_breaks:
            self._names = names_mentioned(type(self._modules[path]))
            self._changed = attributes_changed(type(self._modules[path]))
        names, changed = self._names, self._changed
        for child in self._modules[path].children():
            self._names, self._changed = names, changed
            self._capture(self._first_paths[id(child)], child)

    def _capture(self, path: str, module: nn.Module) -> None:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if is_plain_layer(module):
            self.regions.append(path)
        elif next(module.parameters(), None) is None:
            return  # it holds nothing that a pass could act on
        elif _only_holds_others(module):
            self.capture_children(path)
        elif is_leaf(module):
            return
        elif (reason := _why_calls_are_unknown(module)) is not None:
            advice = self._advice if reason is _UNKNOWN_CALLS else ""
            self._break_at(path, f"module {path!r} ({type(module).__name__}) {reason}{advice}")
        elif parts := sorted(self._names & module._modules.keys()):
            reason = f"has parts ({', '.join(parts)}) that the forward around it may use by itself"
            self._break_at(path, f"module {path!r} ({type(module).__name__}) {reason}")
        elif steered := _attributes_of(module) & self._changed:
            reason = f"has attributes ({', '.join(sorted(steered))}) that the forward around it may change"
            self._break_at(path, f"module {path!r} ({type(module).__name__}) {reason}")
        else:
            self._trace(path, module)

    def _trace(self, path: str, module: nn.Module) -> None:
        inside = {inner[len(path) + 1 :] for inner in self._opaque if is_inside(inner, path)}
        try:
            switches = self._switches.within(path)
            traced = trace(
                module, frozenset(inside), self._foreign, prefix=path, keep=True, mode_switches=switches
            )
            guard_reads(
                become_graph_module(module, traced.graph), traced.graph, traced.reads, self._switches, path
            )
        except CaptureError as error:
            self._break_at(path, str(error))
            return
        self.regions.append(path)
        self._break_inside(path, traced.kept)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module becomes one call, and is not looked into."""
    whole = isinstance(module, torch.jit.ScriptModule) or Tracer().is_leaf_module(module, "")
    return whole and not can_be_looked_into(module)


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of torch with weights, and with the forward of torch."""
    kind = dense_kind_of(module)
    if why_not_a_graph_module(module) is not None:
        return False
    if kind is not None:
        return type(module).forward is kind.module_type.forward
    own = type(module).forward
    return any(isinstance(module, plain) and own is plain.forward for plain in _PLAIN)


_PLAIN: tuple[type[nn.Module], ...] = (
    *(nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *LAYERS_OF_SEVERAL_INPUTS,
)
"""Layers of torch in addition to those of :mod:`biofx.layers`."""


def _only_holds_others(module: nn.Module) -> bool:
    """Whether a module only holds others, which its owner may call one by one."""
    no_forward = getattr(nn.Module, "forward", None)
    return type(module).forward in (no_forward, nn.Sequential.forward)


def _attributes_of(module: nn.Module) -> frozenset[str]:
    """Return the names of the attributes of a module and of those inside it, without tensors and modules."""
    return frozenset(name for inner in module.modules() for name in vars(inner).keys() - _TORCHS_OWN)


_TORCHS_OWN = frozenset(vars(nn.Module()))


def _why_calls_are_unknown(module: nn.Module) -> str | None:
    """Return why a module that Python calls cannot be captured as a whole, None if it can.

    Its arguments are not known. Those without defaults are always passed, and tracing refuses a forward that
    decides by them; others may be left out, or be flags by which the forward decides.
    """
    if "forward" in vars(module):
        return "has had its forward replaced on the instance"
    if isinstance(module, GraphModule):
        return "is a graph module, called from Python"
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    plain = all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)
    if parameters and plain and all(each.default is each.empty for each in parameters):
        return None
    return _UNKNOWN_CALLS


_UNKNOWN_CALLS = "takes arguments of which it is not known how Python will call it"
