"""What dynamo knows about the graph that it hands to a backend: whose forward it is of, and how much of it.

It is read off the frames of Python that are running, since dynamo says it to nobody.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from biofx.errors import CaptureError
from biofx.plasticity.model_states import unwrapped
from biofx.torch_private import FRAME_OF_COMPILATION, FRAMES_OF_MODULES

_TORCH = str(Path(torch.__file__).parent)
_ENTRY = ("compile_wrapper", "eval_frame.py")
_RESUMED = "torch_dynamo_resume_in"
_RESUMED_IN = re.compile(rf"{_RESUMED}_(?P<name>.+)_at_\d+")


@dataclass(frozen=True)
class Compilation:
    """The part of a program of which a backend is given the graph."""

    model: nn.Module
    """The model that was compiled, without wrappers; paths are those in it."""
    begins_late: str
    """Where Python ran before the graph, empty if the graph begins where the model does."""
    ends_early: str
    """Where Python runs after the graph, empty if the graph ends where the model does."""
    code: Any = None
    """The code of the function that is compiled."""

    @property
    def is_whole(self) -> bool:
        """Whether the graph is all that the model computes."""
        return not (self.begins_late or self.ends_early)


def current_compilation(graph_module: GraphModule, parameters: Sequence[Any]) -> Compilation | None:
    """Return what is being compiled right now; None for a function without parameters.

    Args:
        graph_module: as dynamo handed it to the backend.
        parameters: those that it takes.

    Raises:
        CaptureError: the backend was called by something else than ``torch.compile``.
    """
    frames = list(_callers())
    inner = next((frame for frame in frames if _is(frame, FRAME_OF_COMPILATION)), None)
    entry = next((frame for frame in frames if _is(frame, _ENTRY)), None)
    reason = vars(graph_module).get("compile_subgraph_reason")
    if inner is None or entry is None or reason is None:
        raise CaptureError(
            "expected a call by torch.compile, found none: give it the backend, "
            "torch.compile(model, backend=biofx.backend(config)); a graph module goes into biofx.transform"
        )
    between = frames[frames.index(inner) : frames.index(entry)]
    model = _compiled_module(entry, between)
    code = inner.f_locals["code"]
    if model is None and not parameters:
        return None
    if model is None:
        model = _module_in_scope(graph_module, inner, parameters)
    python = [frame for frame in between if not _is_of_torch(frame)]
    resumed = _RESUMED_IN.match(code.co_name)
    while python and resumed is not None and _calls_at_its_end(python[0], resumed["name"]):
        python.pop(0)
    begins_late = f"{_place(python[-1])} runs in Python" if python else ""
    ends_early = begins_late
    if resumed is not None:
        begins_late = begins_late or f"it goes on in {resumed['name']} after a graph break"
    if reason.graph_break:
        ends_early = f"{_stack(reason.user_stack)}: {str(reason.reason).strip().splitlines()[0]}"
    return Compilation(unwrapped(model), begins_late, ends_early, code)


def compiling_frame() -> FrameType | None:
    """Return the frame of dynamo's function that compiles, None where nothing is compiled."""
    return next((frame for frame in _callers() if _is(frame, FRAME_OF_COMPILATION)), None)


def running_module() -> nn.Module | None:
    """Return the model whose compiled forward is being called, without wrappers; None if it is not known."""
    frames = list(_callers())
    entry = next((frame for frame in frames if _is(frame, _ENTRY)), None)
    if entry is None:
        return None
    found = _compiled_module(entry, frames[: frames.index(entry)])
    return None if found is None else unwrapped(found)


def examples_of(graph_module: GraphModule) -> dict[Node, Any]:
    """Return the values that a graph's inputs had when it was traced, where they are known."""
    found = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        given = node.meta.get("grapharg")
        try:
            value = None if given is None else given.example
        except (AssertionError, AttributeError, TypeError):
            continue  # a tensor that is gone
        if value is not None:
            found[node] = value
    return found


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is(frame: FrameType, name: tuple[str, str]) -> bool:
    code = frame.f_code
    return code.co_name == name[0] and code.co_filename.endswith(name[1]) and _is_of_torch(frame)


def _is_of_torch(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_TORCH)


def _calls_at_its_end(frame: FrameType, name: str) -> bool:
    """Whether a frame is a function of a name, or a part of it, which call what comes after a graph break."""
    running, resumed = frame.f_code.co_name, _RESUMED_IN.match(frame.f_code.co_name)
    return running == name or (resumed is not None and resumed["name"] == name)


def _place(frame: FrameType) -> str:
    name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
    return f"{name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _stack(found: Sequence[traceback.FrameSummary]) -> str:
    if not found:
        return "a graph break"
    last = found[-1]
    return f"a graph break at {Path(last.filename).name}:{last.lineno} in {last.name}"


def _compiled_module(entry: FrameType, within: Sequence[FrameType]) -> nn.Module | None:
    """Return the module that was given to ``torch.compile``, or the outermost that a function calls."""
    function: Any = entry.f_locals.get("fn")
    while function is not None:  # dynamo may have wrapped it
        called = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if isinstance(called, nn.Module):
            return called
        function = getattr(function, "__wrapped__", None)
    for frame in reversed(within):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and frame.f_code.co_name in FRAMES_OF_MODULES:
            return owner
    return None


def _module_in_scope(graph_module: GraphModule, inner: FrameType, parameters: Sequence[Any]) -> nn.Module:
    """Return the module that a compiled function reaches its parameters through.

    Raises:
        CaptureError: there is none, or there are several.
    """
    scope = {"L": inner.f_locals["locals"], "G": inner.f_locals["globals"]}
    wanted, found = set(map(id, parameters)), {}
    for node, value in examples_of(graph_module).items():
        source = node.meta["grapharg"].source
        chain = []
        while id(value) in wanted and source is not None:
            chain.append(source)
            source = getattr(source, "base", None)
        for part in reversed(chain):
            name: Any = part.name
            try:
                owner = eval(name() if callable(name) else name, dict(scope))
            except Exception:
                continue
            if isinstance(owner, nn.Module):
                found[id(unwrapped(owner))] = unwrapped(owner)
                break
    if len(found) != 1:
        kinds = ", ".join(type(module).__name__ for module in found.values()) or "none"
        raise CaptureError(
            f"expected a compiled function that calls one model, found {kinds}; compile each model by "
            "itself: torch.compile(model, backend=biofx.backend(config))"
        )
    return next(iter(found.values()))
