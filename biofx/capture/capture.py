"""From a model to a graph that computes the same thing every time it is called.

Symbolic tracing alone loses things silently: a training flag, random numbers and tensors that are made in
``forward`` become constants; gradient and autocast contexts and hooks of containers are dropped. Here each of
them becomes a node. Where that cannot be done, there is a graph break: the module runs its eager forward, and
what it calls is captured in regions of their own. Without regions, the model is refused with the line of its
code that is the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from biofx.capture.attribute_reads import guard_reads
from biofx.capture.example_inputs import ExampleInputs
from biofx.capture.exported_programs import is_exported, model_of
from biofx.capture.intercepted_calls import caches_bypassed
from biofx.capture.observe import observe, observe_without_example
from biofx.capture.record_capture import capture_recorded
from biofx.capture.refused_models import (
    check_conflicts,
    check_input,
    check_methods,
    check_names,
    check_paths,
    copy_of,
)
from biofx.capture.region_capture import capture_regions
from biofx.capture.side_effects import holders_of
from biofx.capture.trace_module import trace
from biofx.errors import CaptureError
from biofx.foreign_errors import foreign_errors_wrapped
from biofx.graph.contexts import preserved_modes
from biofx.graph.regions import GRAPH_BREAKS, graph_breaks_of, region_paths
from biofx.layers.sites import find_sites
from biofx.model.graph_module import BioGraphModule, become_graph_module, follow_changes_within
from biofx.model.modes import switches_of
from biofx.random_state import preserved_random_state
from biofx.static_inspection import is_of


def capture(
    model: nn.Module | ExportedProgram,
    *,
    share_parameters: bool = False,
    opaque: Sequence[str] = (),
    regions: bool = True,
    example_inputs: ExampleInputs | None = None,
) -> BioGraphModule:
    """Return a model as a graph module; the model itself is not changed.

    Args:
        model: any module; a graph module keeps its graph. Of a program of ``torch.export``, or a graph of
            dynamo or ``make_fx``, operators become functions of torch, and layers are called at their paths.
        share_parameters: whether the result holds the parameters of the model instead of copies. Buffers are
            copied in either case.
        opaque: paths of modules that become one call each and are not looked into.
        regions: whether a module that cannot be captured runs its eager forward, while what it calls is
            captured in graphs of its own (see :mod:`biofx.graph.regions`); if False, the model is refused.
        example_inputs: inputs of one call of the model, as ``x``, ``(x, y)``, ``{"x": x}`` or
            ``(args, kwargs)``. The model is then recorded instead of traced symbolically, and more of it
            becomes one graph. A copy of it is run in both modes, with one sample and with sizes doubled; a
            module that the record does not reproduce runs its eager forward.

    Raises:
        InputError: ``model`` is not a module, is wrapped or compiled, has parameters that are not
            initialised yet, cannot be copied, or has no module at a path of ``opaque``.
        CaptureError: with ``regions=False``, the model cannot be captured as one graph without losing
            something; the message names the module and the line. With regions, not even regions can be
            captured. Or a module has a name that code cannot hold.
    """
    model = _module_of(model)
    with foreign_errors_wrapped(CaptureError, f"the capture of {type(model).__name__}"):
        check_names(model)
        check_paths(model, opaque)
        with preserved_random_state(), preserved_modes(), caches_bypassed(model.modules()):
            memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share_parameters else {}
            if isinstance(model, GraphModule):
                captured = BioGraphModule.copy_of(model, memo)
                follow_changes_within(captured)
                _complete_module_stacks(captured)
            else:
                check_conflicts(model)
                root = copy_of(model, memo)
                with _untouched(model):
                    captured = _captured(root, frozenset(opaque), _tensors_of(model), regions, example_inputs)
                    if graph_breaks_of(captured):
                        captured.observed_runs = (
                            observe_without_example(model, frozenset(opaque))
                            if example_inputs is None
                            else observe(model, example_inputs, frozenset(opaque))
                        )
        check_methods(captured)
        vars(captured).setdefault("region_paths", ())
        vars(captured).setdefault(GRAPH_BREAKS, {})
        return captured


def _module_of(model: Any) -> nn.Module:
    """Return a model that can be captured: one that was given as an exported program is made of it.

    Raises:
        InputError: it is no module, or one that cannot be captured.
        CaptureError: the program cannot be written as a model.
    """
    if is_exported(model):
        with foreign_errors_wrapped(CaptureError, f"the capture of an {type(model).__name__}"):
            model = model_of(model)
    check_input(model)
    checked: nn.Module = model
    return checked


def _captured(
    root: nn.Module,
    opaque: frozenset[str],
    foreign: frozenset[int],
    regions: bool,
    example_inputs: ExampleInputs | None,
) -> BioGraphModule:
    """Turn a copy of a model, in place, into a graph module."""
    if example_inputs is not None:
        captured = capture_recorded(root, example_inputs, opaque, foreign)
        if not regions and captured.graph_breaks:
            raise CaptureError(next(iter(captured.graph_breaks.values())))
        if not regions and captured.region_paths:
            raise CaptureError(
                f"module {captured.region_paths[0]!r} is called under torch.utils.checkpoint, and so "
                "has a graph of its own. Switch checkpointing off first"
            )
        return captured
    if regions:
        return capture_regions(root, opaque, foreign)
    switches = switches_of(root)
    traced = trace(root, opaque, foreign, mode_switches=switches)
    captured = become_graph_module(root, traced.graph)
    guard_reads(captured, traced.graph, traced.reads, switches)
    return captured


def trace_function(function: Callable[[Any], Any]) -> Graph:
    """Return the graph of a function of one tensor.

    Raises:
        CaptureError: it cannot be captured without losing something.
    """

    class Holder(nn.Module):
        def forward(self, x: Any) -> Any:
            return function(x)

    with preserved_random_state(), preserved_modes():
        return trace(Holder()).graph


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Refuse a model that its copy reaches through a class or a global, and restore it.

    Raises:
        CaptureError: the forward of the copy assigned to an attribute of the model.
    """
    before = [
        (type(module).__name__, held, dict(held))
        for module in model.modules()
        if not isinstance(module, (torch.jit.ScriptModule, GraphModule))
        for held in holders_of(module)
    ]
    touched: list[str] = []
    try:
        yield
    finally:
        for kind, held, content in before:
            if changed := [name for name in held | content if held.get(name) is not content.get(name)]:
                touched.append(f"{kind}.{changed[0]}")
                held.clear()
                held.update(content)
    if touched:
        raise CaptureError(
            f"the forward of a copy of the model changes {', '.join(dict.fromkeys(touched))} of the model "
            "itself, which it finds through a class or a global; it would not find that of the result. Do "
            "that outside of the forward"
        )


def _tensors_of(model: nn.Module) -> frozenset[int]:
    """Return the ids of all tensors that a model holds."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    plain = (value for value in attributes if is_of(value, Tensor))
    return frozenset(map(id, (*model.parameters(), *model.buffers(), *plain)))


def _complete_module_stacks(graph_module: BioGraphModule) -> None:
    """Add the module to the metadata of nodes without it, as in a graph that was traced by other means."""
    calls: dict[str, int] = {}
    modules = dict(graph_module.named_modules())
    graph = graph_module.graph
    if region_paths(graph_module):
        return  # which the capture has traced
    layer_of = {site.node: site.layer for site in reversed(find_sites(graph_module).found)}
    for node in graph.nodes:
        path = str(node.target) if node.op == "call_module" else layer_of.get(node, "")
        if node.meta.get("nn_module_stack") or not path or path not in modules:
            continue
        count = calls[path] = calls.get(path, -1) + 1
        key = f"{path}@{count}" if count else path
        node.meta["nn_module_stack"] = {key: (path, type(modules[path]))}
