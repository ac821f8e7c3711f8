"""The parameters that eager forwards read: their own, and those of layers below them that they do not call.

A module whose parameters are read by its eager forward alone becomes a region of another kind: its graph
reads the parameters and passes them to the forward, so that passes find expressions to rewrite. The experts
of a mixture are an example: values decide which of them is called, and they hold most of the weights. So is
the recurrent weight that a loop over time multiplies by a mask.
"""

from __future__ import annotations

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
from biofx.graph.graph_functions import parameters_graph
from biofx.graph.regions import is_inside
from biofx.layers import dense_kind_of
from biofx.layers.layer_kind import hooks_of
from biofx.model.graph_module import (
    NAMES_OF_GRAPH_MODULES,
    BioGraphModule,
    user_class,
    why_not_a_graph_module,
)


def show_parameters_read_by_python(captured: BioGraphModule) -> None:
    """Give eager forwards of a captured model graphs that read the parameters they use, where that is safe.

    A layer whose weight an eager forward uses without calling it is no region any more: the forward finds the
    expression in its place, whether it uses the weight or calls the layer. Where that is not safe, the region
    of the layer keeps its weight as it is, with a reason.
    """
    breaks = [path for path in captured.graph_breaks if path in dict(captured.named_modules())]
    read = {path: _names_held(captured.get_submodule(path)) for path in modules_that_read(captured)}
    refused: dict[str, str] = {}
    mentioned = _regions_mentioned(captured, breaks)
    for region, (reader, *others) in mentioned.items():
        if not others and _can_be_read_from(captured, reader, region):
            start = len(reader) + bool(reader)
            inside = [f"{region[start:]}.{name}" for name in _names_held(captured.get_submodule(region))]
            read[reader] = (*read.get(reader, ()), *inside)
        else:
            named = f"module {reader!r}" if reader else "the model"
            refused[region] = f"the forward of {named}, in Python, may use its weight without calling it"
    captured.region_paths = (
        *(path for path in captured.region_paths if path not in mentioned or path in refused),
        *(path for path in read if path),
    )
    captured.read_by_python = refused
    captured.parameters_read = read
    if "" in read:
        captured.graph = parameters_graph(captured, read[""])


def modules_that_read(captured: BioGraphModule) -> list[str]:
    """Return the paths of the modules whose parameters are read by their eager forward alone.

    An eager forward around such a module that mentions a parameter of it, or a method other than the forward,
    may read them too.
    """
    modules = dict(captured.named_modules())
    breaks = [path for path in captured.graph_breaks if path in modules]
    mentioned = {path: names_mentioned(type(modules[path])) for path in breaks}
    found = []
    for path in mentioned:
        module = modules[path]
        names = set(_names_held(module))
        if not names or not _can_have_expressions(module):
            continue
        telling = {name for name in names if not is_a_weight(name)} | _other_methods(module)
        around = [outer for outer in mentioned if outer != path and is_inside(path, outer)]
        if names <= mentioned[path] and not any(telling & mentioned[outer] for outer in around):
            found.append(path)
    return found


def _names_held(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, parameter in module._parameters.items() if parameter is not None)


def _regions_mentioned(captured: BioGraphModule, breaks: list[str]) -> dict[str, list[str]]:
    """Return the regions whose weights eager forwards may read without calling them, and the readers.

    A forward may if its code mentions the ``weight`` of the layer, or of something that has no name in it.
    """
    found: dict[str, list[str]] = {}
    for path in breaks:
        mentioned = weights_mentioned(type(captured.get_submodule(path)))
        start = f"{path}." if path else ""
        for region in captured.region_paths if mentioned else ():
            parts = set(region[len(start) :].split(".")) if region.startswith(start) else set()
            if parts and (ANYTHING in mentioned or parts & mentioned):
                found.setdefault(region, []).append(path)
    return found


def _can_be_read_from(captured: BioGraphModule, reader: str, region: str) -> bool:
    """Whether the weight of a layer can be an expression in the eager forward of a module above it."""
    layer = captured.get_submodule(region)
    kind = dense_kind_of(layer)
    if kind is None or isinstance(layer, GraphModule) or type(layer).forward is not kind.module_type.forward:
        return False
    return _can_have_expressions(captured.get_submodule(reader)) and not hooks_of(layer)


def _can_have_expressions(module: nn.Module) -> bool:
    held = [parameter for parameter in module._parameters.values() if parameter is not None]
    plain_call: Any = nn.Module.__call__
    kind: Any = user_class(module)  # of the model itself, which is a graph module by now
    is_foreign = isinstance(module, GraphModule) and not isinstance(module, BioGraphModule)
    return (
        kind is not None
        and not is_foreign
        and not isinstance(module, torch.jit.ScriptModule)
        and why_not_a_graph_module(module) is None
        and not methods_mentioned(kind) & NAMES_OF_GRAPH_MODULES
        and kind.__call__ is plain_call
        and "forward" not in vars(module)
        and len(set(map(id, held))) == len(held)
        and not module._forward_pre_hooks  # which may compute a weight from parameters before the forward
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
