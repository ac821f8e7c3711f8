"""From a model to a graph that computes the same thing every time it is called.

Symbolic tracing alone loses things without a word: a training flag, random numbers and tensors made in
``forward`` become constants, gradient and autocast contexts and hooks of containers vanish. Here each is
written down as a node, or the module that does it keeps its own forward and what it calls is captured in
regions of their own, or, if asked to, the model is refused with the line that is in the way.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from biofx.capture.attribute_reads import guard_reads
from biofx.capture.bytecode import methods_mentioned
from biofx.capture.example_inputs import ExampleInputs
from biofx.capture.intercepted_calls import caches_bypassed
from biofx.capture.mode_switches import switches_of
from biofx.capture.record_capture import capture_recorded
from biofx.capture.region_capture import capture_regions
from biofx.capture.side_effects import holders_of
from biofx.capture.trace_module import trace
from biofx.errors import CaptureError, InputError
from biofx.foreign_errors import foreign_errors_wrapped
from biofx.graph.contexts import preserved_modes
from biofx.graph.names import refuse_names_of_states, refuse_taken_names, refuse_unwritable_names
from biofx.graph.regions import region_paths
from biofx.layers.sites import find_sites
from biofx.model.copies import deep_copy
from biofx.model.graph_module import (
    NAMES_OF_GRAPH_MODULES,
    NAMES_OF_MODELS,
    BioGraphModule,
    become_graph_module,
    follow_changes_within,
    user_class,
)
from biofx.plasticity.bio_state import BioState
from biofx.static_inspection import content_of, is_of


def capture(
    model: nn.Module,
    *,
    share_parameters: bool = False,
    opaque: Sequence[str] = (),
    regions: bool = True,
    example_inputs: ExampleInputs | None = None,
) -> BioGraphModule:
    """Return a model as a graph module of its own; the model itself is not touched.

    Args:
        model: any module; one that is a graph module already keeps its graph.
        share_parameters: let the result hold the model's own parameters instead of copies. Buffers are
            copied all the same.
        opaque: paths of modules not to look into, which then become one call each.
        regions: where something cannot be captured, let the module in which it is keep its own forward,
            and capture what that calls in graphs of their own (see :mod:`biofx.regions`); if False, refuse.
        example_inputs: of one call of the model, as ``x``, ``(x, y)``, ``{"x": x}`` or ``(args, kwargs)``. It
            is then recorded instead of traced without inputs: more of it becomes one graph. The model is run
            on a copy, in both modes, with one sample and with sizes doubled; whatever the record does not
            get right keeps its own forward.

    Raises:
        InputError: ``model`` is not a module, is wrapped or compiled, has parameters that are not
            initialised yet, cannot be copied, or has no module at a path of ``opaque``.
        CaptureError: with ``regions=False``, its forward cannot be captured as one graph without losing
            something; the message names the module and the line. With regions, that neither can be. Or a
            module has a name that code cannot carry.
    """
    _check_input(model)
    with foreign_errors_wrapped(CaptureError, f"the capture of {type(model).__name__}"):
        return _captured(
            model,
            share_parameters=share_parameters,
            opaque=opaque,
            regions=regions,
            example_inputs=example_inputs,
        )


def _captured(
    model: nn.Module,
    *,
    share_parameters: bool,
    opaque: Sequence[str],
    regions: bool,
    example_inputs: ExampleInputs | None,
) -> BioGraphModule:
    refuse_unwritable_names(model)
    _check_paths(model, opaque)
    with (
        preserved_random_state(),
        preserved_modes(),
        caches_bypassed(model.modules()),
        ExitStack() as stack,
    ):
        memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share_parameters else {}
        if isinstance(model, GraphModule):
            captured = BioGraphModule.copy_of(model, memo)
            follow_changes_within(captured)
            _complete_module_stacks(captured)
        else:
            _refuse_lost_methods(model)
            refuse_taken_names(model, NAMES_OF_GRAPH_MODULES | NAMES_OF_MODELS)
            refuse_names_of_states(model, "bio_mod", BioState)
            root = _copy(model, memo)
            _refuse_ties(model, root)
            foreign = _tensors_of(model)
            stack.enter_context(_untouched(model))
            if example_inputs is not None:
                captured = capture_recorded(root, example_inputs, frozenset(opaque), foreign)
                if not regions and captured.graph_breaks:
                    raise CaptureError(next(iter(captured.graph_breaks.values())))
                if not regions and captured.region_paths:
                    raise CaptureError(
                        f"module {captured.region_paths[0]!r} is called under torch.utils.checkpoint, and so "
                        "has a graph of its own. Switch checkpointing off first"
                    )
            elif regions:
                captured = capture_regions(root, frozenset(opaque), foreign)
            else:
                switches = switches_of(root)
                traced = trace(root, frozenset(opaque), foreign, mode_switches=switches)
                captured = become_graph_module(root, traced.graph)
                guard_reads(captured, traced.graph, traced.reads, switches)
    _refuse_hidden_methods(captured)
    for name, nothing in (("region_paths", ()), ("graph_breaks", {})):
        vars(captured).setdefault(name, nothing)
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
def preserved_random_state() -> Iterator[None]:
    """Leave the global random states of Python, NumPy (where it is loaded) and torch as they were."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    python_state = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy_random is not None:
                numpy_random.set_state(numpy_state)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Refuse a model that is reached from its copy, through a class or a global, and put it back.

    Raises:
        CaptureError: the forward of the copy gave an attribute of the model another value.
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


_WRAPPERS = {
    "DistributedDataParallel": "wrap the result instead: DistributedDataParallel(bio_model)",
    "DataParallel": "wrap the result instead: DataParallel(bio_model)",
    "FullyShardedDataParallel": "shard the result instead",
    "FSDPModule": "shard the result instead: fully_shard(bio_model)",
    "OptimizedModule": "transform the model first and compile the result: torch.compile(bio_model)",
    "ScriptModule": "transform the model before it is scripted",
    "AveragedModel": "transform model.module and average the result",
}


def _check_input(model: object) -> None:
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        hint = "; create an instance of it first" if isinstance(model, type) else ""
        raise InputError(f"expected a torch.nn.Module, found {what}{hint}")
    for path, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)
        if wrapper is not None and (not path or wrapper != "ScriptModule"):
            what = f"one whose module {path!r} is a {wrapper}" if path else f"a {wrapper}"
            raise InputError(f"expected an unwrapped model, found {what}; {_WRAPPERS[wrapper]}")
    for path, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(
                f"expected initialised parameters, found {path!r} still lazy; run the model once first"
            )


def _check_paths(model: nn.Module, opaque: Sequence[str]) -> None:
    if isinstance(opaque, str):
        raise InputError(f"opaque: expected a list of module paths, found the text {opaque!r}")
    paths = {path for path, _ in model.named_modules() if path}
    for path in opaque:
        if path not in paths:
            raise InputError(
                f"opaque: expected the path of a module, found {path!r}, which the model does not have"
            )


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return deep_copy(model, memo)
    except Exception as error:
        raise InputError(
            f"expected a model that copy.deepcopy can copy; {_what_cannot_be_copied(model)} makes it fail: "
            f"{error}"
        ) from error


def _what_cannot_be_copied(model: nn.Module) -> str:
    """Return which attribute of a model makes a copy of it fail, or else the model's class."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters", "_buffers"):
                try:
                    copy.deepcopy(value)
                except Exception:
                    place = f"{path}.{name}" if path else name
                    return f"attribute {place!r} ({type(value).__name__})"
    return type(model).__name__


_METHODS_OF_THE_CALL = ("__call__", "_call_impl")


def _refuse_lost_methods(model: nn.Module) -> None:
    """Refuse a model that decides itself what a call of it means."""
    for name in _METHODS_OF_THE_CALL:
        if getattr(type(model), name, None) is not getattr(nn.Module, name, None):
            raise CaptureError(
                f"the model ({type(model).__name__}) has a {name}() of its own, which the result would not "
                "have. Make the model a submodule of one that only calls it, and transform that"
            )
    if "forward" in vars(model):
        raise CaptureError(
            f"the model ({type(model).__name__}) has had its forward replaced on the instance, which a copy "
            "cannot follow. Make the new forward a method of a class"
        )


def _refuse_hidden_methods(captured: BioGraphModule) -> None:
    """Refuse a model that runs its own forward, where that asks for what graph modules have by that name."""
    origin = user_class(captured)
    if origin is None or not captured.keeps_forward:
        return
    if hidden := sorted(methods_mentioned(origin) & NAMES_OF_GRAPH_MODULES):
        raise CaptureError(
            f"the forward of the model ({origin.__name__}) runs in Python and uses {hidden[0]!r} of its "
            "class, a name that graph modules use themselves; call it something else, or make the model a "
            "submodule of one that only calls it, and transform that"
        )


def _tensors_of(model: nn.Module) -> frozenset[int]:
    """Return the ids of all tensors that a model holds."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    plain = (value for value in attributes if is_of(value, Tensor))
    return frozenset(map(id, (*model.parameters(), *model.buffers(), *plain)))


def _refuse_ties(model: nn.Module, root: nn.Module) -> None:
    """Refuse functions that a copy holds and that go on referring to the modules of the original."""
    originals = {id(module) for module in model.modules()}
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            for function in _functions_in(value):
                cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
                tied = [content.__self__ if is_of(content, MethodType) else content for content in cells]
                if any(id(content) in originals for content in tied):
                    owner = f"module {path!r}" if path else "the model"
                    raise CaptureError(
                        f"{owner} holds a function ({function.__qualname__}, in {name!r}) that refers to "
                        "modules of the model, and would go on using the original's. Make it a method"
                    )


def _functions_in(value: Any) -> Iterator[FunctionType]:
    if is_of(value, FunctionType):
        yield value
    elif is_of(value, (list, tuple)):
        yield from (entry for entry in content_of(value) if is_of(entry, FunctionType))
    elif is_of(value, dict):
        yield from (entry for _, entry in content_of(value) if is_of(entry, FunctionType))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _complete_module_stacks(graph_module: BioGraphModule) -> None:
    """Say of nodes that came without it (from a graph traced elsewhere) which module they belong to."""
    calls: dict[str, int] = {}
    modules = dict(graph_module.named_modules())
    graph = graph_module.graph
    if region_paths(graph_module):
        return  # their tracing said so
    layer_of = {site.node: site.layer for site in reversed(find_sites(graph_module).found)}
    for node in graph.nodes:
        path = str(node.target) if node.op == "call_module" else layer_of.get(node, "")
        if node.meta.get("nn_module_stack") or not path or path not in modules:
            continue
        count = calls[path] = calls.get(path, -1) + 1
        key = f"{path}@{count}" if count else path
        node.meta["nn_module_stack"] = {key: (path, type(modules[path]))}
