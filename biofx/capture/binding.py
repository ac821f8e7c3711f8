"""From the arguments of a recorded call to the inputs of its graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from biofx.capture.frames import Frame
from biofx.graph.guards import require_default, require_tensor

_SETTLED = (bool, int, float, str, type(None))


def bind_inputs(
    frame: Frame, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Make an input of a graph for each argument that a forward was given; return what to call it with.

    The graph takes the arguments under their names. What was left out, or decides something, stays as it was:
    the graph checks it at every call.
    """
    signature = inspect.signature(module.forward)
    given = signature.bind(*args, **kwargs).arguments
    taken: dict[str, Any] = {}
    optional = False
    for name, parameter in signature.parameters.items():
        optional = optional or parameter.default is not parameter.empty
        if parameter.kind is parameter.VAR_POSITIONAL:
            if given.get(name):
                frame.stop("takes any number of arguments")
        elif parameter.kind is parameter.VAR_KEYWORD:
            taken |= {key: _taken(frame, key, value, (None,)) for key, value in given.get(name, {}).items()}
        elif name in given:
            default = parameter.default if isinstance(parameter.default, _SETTLED) else None
            taken[name] = _taken(frame, name, given[name], (default,) if optional else ())
        elif isinstance(parameter.default, _SETTLED):
            node = frame.node("placeholder", name, (parameter.default,))
            frame.node("call_function", require_default, (node, parameter.default, name))
    _move_placeholders_ahead(frame)
    positional = [
        taken.pop(name)
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.POSITIONAL_ONLY and name in taken
    ]
    return positional, taken


def _taken(frame: Frame, name: str, value: Any, default: tuple[Any, ...]) -> Any:
    node = frame.node("placeholder", name, default)
    if isinstance(value, Tensor) and default:
        place = f"argument {name!r} was a tensor when recorded, and the graph"
        frame.node("call_function", require_tensor, (node, place))
    return frame.take(node, value, guard=name)


def _move_placeholders_ahead(frame: Frame) -> None:
    first = next((node for node in frame.graph.nodes if node.op != "placeholder"), None)
    for node in list(frame.graph.nodes):
        if first is not None and node.op == "placeholder":
            first.prepend(node)
