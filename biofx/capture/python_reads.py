"""The parameters that eager forwards read: their own, and those of regions below them.

A module whose parameters are read by its eager forward alone becomes a region of another kind: its graph
reads the parameters and passes them to the forward, so that passes find expressions to rewrite. The experts
of a mixture are an example: values decide which of them is called, and they hold most of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from biofx.capture.bytecode import (
    ANYTHING,
    is_a_weight,
    methods_mentioned,
    names_mentioned,
    weights_mentioned,
)
from biofx.graph.regions import is_inside
from biofx.model.graph_module import NAMES_OF_GRAPH_MODULES, BioGraphModule, why_not_a_graph_module


def modules_that_read(captured: BioGraphModule) -> Iterator[str]:
    """Yield the paths of the modules whose parameters are read by their eager forward alone.

    An eager forward around such a module that mentions a parameter of it, or a method other than the forward,
    may read them too.
    """
    modules = dict(captured.named_modules())
    breaks = [path for path in captured.graph_breaks if path in modules]
    mentioned = {path: names_mentioned(type(modules[path])) for path in breaks}
    for path in mentioned:
        module = modules[path]
        if not path or not _can_have_expressions(module):
            continue
        names = {name for name, parameter in module._parameters.items() if parameter is not None}
        telling = {name for name in names if not is_a_weight(name)} | _other_methods(module)
        around = [outer for outer in mentioned if outer != path and is_inside(path, outer)]
        if names <= mentioned[path] and not any(telling & mentioned[outer] for outer in around):
            yield path


def weights_read_by_python(captured: BioGraphModule) -> dict[str, str]:
    """Return the regions whose weights an eager forward may read without calling them, and why.

    It may if its code mentions the ``weight`` of the layer, or of something that has no name in it.
    """
    found: dict[str, str] = {}
    for path in captured.graph_breaks:
        mentioned = weights_mentioned(type(captured.get_submodule(path)))
        start = f"{path}." if path else ""
        for region in captured.region_paths if mentioned else ():
            parts = set(region[len(start) :].split(".")) if region.startswith(start) else set()
            if parts and (ANYTHING in mentioned or parts & mentioned):
                owner = f"module {path!r}" if path else "the model"
                found[region] = f"the forward of {owner}, in Python, may use its weight without calling it"
    return found


def _can_have_expressions(module: nn.Module) -> bool:
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    plain_call: Any = nn.Module.__call__
    ordinary = type(module).__call__ is plain_call and "forward" not in vars(module)
    return (
        bool(held)
        and why_not_a_graph_module(module) is None
        and not methods_mentioned(type(module)) & NAMES_OF_GRAPH_MODULES
        and ordinary
        and len(set(map(id, held))) == len(held)
        and not module._forward_pre_hooks  # which may compute a weight from parameters before the forward
        and not isinstance(module, (GraphModule, torch.jit.ScriptModule))
    )


def _other_methods(module: nn.Module) -> set[str]:
    """Return the names of the methods other than the forward that a class of the user has."""
    return {
        name
        for kind in type(module).__mro__
        if not kind.__module__.startswith("torch.")
        for name, value in vars(kind).items()
        if isinstance(value, (FunctionType, property)) and name != "forward" and not name.startswith("__")
    }
