"""Which modules that stay in Python read parameters of their own in a way that a graph can stand before.

The experts of a mixture are the case in point: where a token goes is decided by values, and what the experts
weigh is most of the model. Such a module becomes a region of another kind: its graph reads the parameters and
hands them to the module's own forward, so that passes find an expression to act on.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from biofx.capture.bytecode import is_a_weight, methods_mentioned, names_mentioned
from biofx.graph.regions import is_inside
from biofx.model.graph_module import NAMES_OF_GRAPH_MODULES, BioGraphModule, why_not_a_graph_module


def modules_that_read(captured: BioGraphModule) -> Iterator[str]:
    """Yield the paths of the modules with parameters that their own forward alone reads, in Python.

    Others might read them too: a forward around it that mentions the parameter or calls another method than
    the forward. Then nothing is known.
    """
    kept = captured.graph_breaks
    modules = dict(captured.named_modules())
    mentioned = {path: names_mentioned(type(modules[path])) for path in kept if path in modules}
    for path in mentioned:
        module = modules[path]
        if not path or not _can_stand_before(module):
            continue
        names = {name for name, parameter in module._parameters.items() if parameter is not None}
        told = {name for name in names if not is_a_weight(name)} | _other_methods(module)
        around = [outer for outer in mentioned if outer != path and is_inside(path, outer)]
        if names <= mentioned[path] and not any(told & mentioned[outer] for outer in around):
            yield path


def _can_stand_before(module: nn.Module) -> bool:
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    plain_call: Any = nn.Module.__call__
    ordinary = type(module).__call__ is plain_call and "forward" not in vars(module)
    return (
        bool(held)
        and why_not_a_graph_module(module) is None
        and not methods_mentioned(type(module)) & NAMES_OF_GRAPH_MODULES
        and ordinary
        and len(set(map(id, held))) == len(held)
        and not module._forward_pre_hooks  # which may compute a weight from parameters, ahead of the forward
        and not isinstance(module, (GraphModule, torch.jit.ScriptModule))
    )


def _other_methods(module: nn.Module) -> set[str]:
    """Return the names of the methods that a class of the user's has besides its forward."""
    return {
        name
        for kind in type(module).__mro__
        if not kind.__module__.startswith("torch.")
        for name, value in vars(kind).items()
        if isinstance(value, (FunctionType, property)) and name != "forward" and not name.startswith("__")
    }
