"""A model's graph and those of its regions as one graph, for a rewrite that sees the whole model.

The graphs of the regions are written into the model's graph one after the other, each between a node that
begins and a node that ends it, with full paths and unique names. After the rewrite each region takes its part
back (:func:`biofx.model.region_parts.joined`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.node import map_arg

from biofx.errors import PassError
from biofx.graph.graph_functions import (
    EAGER_FORWARD,
    OWN_MODULE,
    call_own_forward,
    call_with_parameters,
    parameters_graph,
)
from biofx.graph.guards import require_default
from biofx.graph.modules_by_path import modules_by_path
from biofx.graph.regions import (
    ELSEWHERE,
    JOINED,
    begin_region,
    graph_breaks_of,
    is_inside,
    is_joined,
    parameters_read_by,
    region_input,
    region_output,
    region_paths,
)
from biofx.torch_private import codegen_of


def whole_graph(graph_module: GraphModule) -> Graph:
    """Return a model's graph with those of its regions; a copy if there are any, else the graph itself."""
    paths = region_paths(graph_module)
    if not paths or is_joined(graph_module):
        return graph_module.graph
    return _Join(graph_module, paths).graph


def whole_view(graph_module: GraphModule) -> GraphModule:
    """Return a view of a model in which the graphs of its regions are one; the model itself if it has none.

    The view shares the modules and tensors of the model, which is not changed.
    """
    if not region_paths(graph_module) or is_joined(graph_module):
        return graph_module
    view: GraphModule = object.__new__(type(graph_module))
    vars(view).update(vars(graph_module))
    vars(view).update({"_graph": whole_graph(graph_module), JOINED: True})
    return view


class _Join:
    """Writes a model's graph and those of its regions into one; each region comes before its call."""

    def __init__(self, root: GraphModule, paths: tuple[str, ...]) -> None:
        self._modules = modules_by_path(root)
        self._in_python = graph_breaks_of(root)
        self._read = parameters_read_by(root)
        self._open = dict.fromkeys(paths)
        self._around = {path[:end] for path in paths for end in (*_dots(path), len(path))} | {""}
        self.graph = Graph(root, tracer_cls=Tracer)
        self.graph.set_codegen(copy.deepcopy(codegen_of(root.graph)))
        mapping: dict[Node, Node] = {}
        for node in root.graph.nodes:
            if node.op in ("call_module", "get_attr"):  # get_attr where it is called under checkpointing
                self._write_regions_in(str(node.target))
            elif node.op == "output":
                self._write_regions_in("")
            mapping[node] = self.graph.node_copy(node, mapping.__getitem__)

    def _write_regions_in(self, path: str) -> None:
        if path not in self._around:
            return
        for region in [region for region in self._open if is_inside(region, path)]:
            if region in self._open:
                del self._open[region]
                self._write(region)

    def _write(self, path: str) -> None:
        source = self._source(path)
        for node in source.nodes:
            if node.op in ("call_module", "get_attr") and str(node.target):
                self._write_regions_in(f"{path}.{node.target}")
        stack = self._stack(path)
        name = path.replace(".", "_")
        begin = self.graph.create_node("call_function", begin_region, (path,), name=f"{name}_begin")
        begin.meta["nn_module_stack"] = stack
        mapping: dict[Node, Node] = {}
        for node in source.nodes:
            if node.target == EAGER_FORWARD:
                continue
            new = mapping[node] = self._copied(node, path, mapping)
            inner = node.meta.get("nn_module_stack") or {}
            new.meta["nn_module_stack"] = {**stack, **_prefixed(inner, path)}

    def _copied(self, node: Node, path: str, mapping: dict[Node, Node]) -> Node:
        name = path.replace(".", "_")
        if node.op == "placeholder":
            default: Any = map_arg(node.args, mapping.__getitem__)
            arguments: Any = (path, str(node.target), *default)
            suffix = str(node.target).strip("*")
            return self.graph.create_node("call_function", region_input, arguments, name=f"{name}_{suffix}")
        if node.op == "output":
            value: Any = map_arg(node.args[0], mapping.__getitem__)
            return self.graph.create_node("call_function", region_output, (path, value), name=f"{name}_end")
        if node.target is call_own_forward:  # a layer that is a region by itself, with nodes after its call
            args: Any = map_arg(node.args[1], mapping.__getitem__)
            kwargs: Any = map_arg(node.args[2], mapping.__getitem__)
            return self.graph.create_node("call_module", path, args, kwargs, node.name)
        if node.target is call_with_parameters:  # a module that runs in Python, by its path
            given: Any = map_arg(node.args[1:], mapping.__getitem__)
            return self.graph.create_node(
                "call_function", call_with_parameters, (path, *given), {}, node.name
            )
        copied = self._node_copy(node, name, mapping)
        if node.op in ("call_module", "get_attr"):
            copied.target = self._path_of(str(node.target), path)
        return copied

    def _path_of(self, target: str, region: str) -> str:
        """Return the path, in the whole model, of what a region's graph calls or reads."""
        if target in ("", OWN_MODULE):
            return region
        mark, _, rest = target.partition(".")
        if mark != ELSEWHERE:
            return f"{region}.{target}"
        name, _, held = rest.partition(".")
        other = getattr(vars(self._modules[region])[ELSEWHERE], name)
        for path, module in self._modules.items():
            if module is other:
                return f"{path}.{held}"
        raise PassError(
            f"the region of {region!r} reads from a {type(other).__name__} that is no longer there"
        )

    def _node_copy(self, node: Node, stem: str, mapping: dict[Node, Node]) -> Node:
        """Copy a node; the name of a call of a module begins with the path of the region."""
        args: Any = map_arg(node.args, mapping.__getitem__)
        kwargs: Any = map_arg(node.kwargs, mapping.__getitem__)
        plain = node.name.lstrip("_")
        by_path = node.op == "call_module" and not plain.startswith(stem)
        name = f"{stem}_{plain}" if by_path else node.name
        copied = self.graph.create_node(
            node.op,
            str(node.target) if node.op != "call_function" else node.target,
            args,
            kwargs,
            name,
            node.type,
        )
        copied.meta = dict(node.meta)
        return copied

    def _source(self, path: str) -> Graph:
        module = self._modules[path]
        if isinstance(module, GraphModule):
            return module.graph
        if path in self._in_python:
            return parameters_graph(module, self._read.get(path, ()))
        return layer_graph(module, path)

    def _stack(self, path: str) -> dict[str, tuple[str, type]]:
        parts = path.split(".")
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return {place: (place, type(self._modules[place])) for place in above}


def layer_graph(module: nn.Module, path: str) -> Graph:
    """Return the graph of a layer that is a region by itself: one call of it, with an empty path."""
    graph = Graph(tracer_cls=Tracer)
    inputs = []
    for name, parameter in list(inspect.signature(type(module).forward).parameters.items())[1:]:
        default = () if parameter.default is parameter.empty else (parameter.default,)
        given = graph.create_node("placeholder", name, default)
        if name == "output_size":  # of a transposed convolution
            graph.create_node("call_function", require_default, (given, parameter.default, name))
        else:
            inputs.append(given)
    graph.output(graph.create_node("call_module", "", tuple(inputs), name=path.replace(".", "_")))
    return graph


def _dots(path: str) -> list[int]:
    return [place for place, character in enumerate(path) if character == "."]


def _prefixed(stack: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {f"{path}.{key}": (f"{path}.{place}", kind) for key, (place, kind) in stack.items()}
