"""Graphs that others have captured: exported programs, and graphs of dynamo and of ``make_fx``.

Such a graph calls operators of ATen, or functions, on parameters. It becomes one of functions of torch and of
layers at their paths, which is what a capture by biofx gives, and everything else follows.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from biofx.capture.aten_functions import become_function, is_aten, parts_instead_of_all
from biofx.capture.exported_layers import FLAGS, Layers, flag_of, full_name
from biofx.capture.exported_signature import take_plain_signature
from biofx.errors import BiofxWarning, CaptureError
from biofx.graph.regions import joined_path
from biofx.layers.layer_kind import argument
from biofx.model.graph_module import BioGraphModule
from biofx.random_state import preserved_random_state
from biofx.torch_private import codegen_of, pytree

_ORIGINAL_NAMES = "dynamo_flat_name_to_original_fqn"
_STACK = "nn_module_stack"
_ROOT, _ENTRY, _CALL_NUMBER = (
    re.compile(r"^L\['\w+'\]"),
    re.compile(r"(?:\._modules)?\['(\w+)'\]"),
    re.compile(r"@\d+"),
)
"""Of paths as dynamo writes them, and of second calls."""


def is_exported(model: object) -> TypeGuard[ExportedProgram | GraphModule]:
    """Whether an object is a program, or a graph module, that torch has captured."""
    if isinstance(model, ExportedProgram):
        return True
    if not isinstance(model, GraphModule):
        return False
    return bool(_original_names(model)) or any(map(is_aten, model.graph.nodes))


def model_of(exported: ExportedProgram | GraphModule) -> BioGraphModule:
    """Return a graph module of functions and layers that computes what an exported graph does.

    It holds the same parameters and buffers, under their original names where those are known. Dropout and
    normalisation follow ``train()`` and ``eval()``, and a warning says that anything else is as in the mode
    of the export.

    Raises:
        CaptureError: the graph's inputs or outputs cannot be written as a forward's, or the result does not
            compute the same for the example inputs of the program.
    """
    if isinstance(exported, ExportedProgram):
        source = exported.module(check_guards=False)
        made = _rebuilt(source, exported.range_constraints)
        if exported.example_inputs is not None:
            _compare(source, made, exported.example_inputs)
    else:
        made = _rebuilt(exported, {})
    mode, other = ("training", "evaluation") if made.training else ("evaluation", "training")
    warnings.warn(
        f"the program was exported in {mode}: dropout and normalisation follow train() and eval(), and what "
        f"else the model's code does otherwise in {other} is not in it",
        BiofxWarning,
        stacklevel=5,
    )
    return made


def _rebuilt(source: GraphModule, ranges: Mapping[Any, Any]) -> BioGraphModule:
    graph, names = Graph(), _original_names(source)
    copied: dict[Node, Node] = {}
    graph.output(graph.graph_copy(source.graph, copied))
    graph.set_codegen(codegen_of(source.graph))
    for old, new in copied.items():
        new.meta = {key: old.meta[key] for key in ("val", _STACK, "stack_trace") if key in old.meta}
    for read in graph.find_nodes(op="get_attr"):
        read.target = names.get(str(read.target), read.target)
    root = tree_of(source, graph, names)
    take_plain_signature(graph, ranges)
    for node in list(graph.nodes):
        parts_instead_of_all(node)
    for node in graph.nodes:
        if is_aten(node):
            become_function(node)
    training = mode_of(graph)
    root.train(training)
    for node in graph.nodes:
        node.meta[_STACK] = _plain_stack(node)
    Layers(root, graph, training).raise_all()
    for node in list(graph.nodes):
        _follow_mode(root, node, training)
        node.meta.pop("val", None)
    for node in reversed(graph.nodes):
        if not node.users and (node.op == "get_attr" or node.target in (operator.getitem, "size")):
            graph.erase_node(node)
    graph.lint()
    return BioGraphModule.from_root(root, graph, _class_name(source))


def _original_names(source: GraphModule) -> dict[str, str]:
    """Return the names that the model has for what a graph holds under others."""
    meta = vars(source).get("meta", {})  # a model's own module may have that name
    return {str(flat): str(name) for flat, name in meta.get(_ORIGINAL_NAMES, {}).items()}


def tree_of(source: nn.Module, graph: Graph, names: Mapping[str, str]) -> nn.Module:
    """Return modules that hold, at the original paths, the tensors of a graph's model and nothing else.

    Args:
        source: holds the tensors.
        graph: what it reads and calls is there, too.
        names: the original paths of tensors that ``source`` holds under others.
    """
    root = nn.Module()
    state = source.state_dict(keep_vars=True)

    def owner_of(path: str) -> tuple[nn.Module, str]:
        owner, (*places, name) = root, path.split(".")
        for place in places:
            if place not in owner._modules:
                owner.add_module(place, nn.Module())
            owner = owner.get_submodule(place)
        return owner, name

    for path, parameter in source.named_parameters(remove_duplicate=False):
        owner, name = owner_of(names.get(path, path))
        owner.register_parameter(name, parameter)
    for path, buffer in source.named_buffers(remove_duplicate=False):
        owner, name = owner_of(names.get(path, path))
        owner.register_buffer(name, buffer, persistent=path in state)
    for node in (*graph.find_nodes(op="get_attr"), *graph.find_nodes(op="call_module")):
        path = str(node.target)
        owner, name = owner_of(path)
        if not hasattr(owner, name):  # a constant, or the graph of a branch
            setattr(owner, name, operator.attrgetter(path)(source))
    for path in (path for node in graph.nodes for path in _plain_stack(node)):
        owner, name = owner_of(path)
        if name not in owner._modules:
            owner.add_module(name, nn.Module())
    return root


def _class_name(source: GraphModule) -> str:
    """Return the name of the model's class, where the graph tells it."""
    for node in source.graph.nodes:
        for path, kind in (node.meta.get(_STACK) or {}).values():
            if path == "":
                return full_name(kind).rpartition(".")[2]
    return type(source).__name__


def _plain_stack(node: Node) -> dict[str, tuple[str, Any]]:
    """Return in which modules a node was called, by path, without the model itself."""
    found = {}
    for path, kind in (node.meta.get(_STACK) or {}).values():
        plain = _CALL_NUMBER.sub("", _ENTRY.sub(r".\1", _ROOT.sub("", path))).strip(".")
        if plain:
            found[plain] = (plain, kind)
    return found


def mode_of(graph: Graph) -> bool:
    """Return the mode in which a graph was exported: training, unless its functions say otherwise."""
    flags = [flag for node in graph.nodes if (flag := flag_of(node)) is not None]
    return any(flags) or not flags


def _follow_mode(root: nn.Module, node: Node, training: bool) -> None:
    """Let a function that was told the mode of the export read the mode of its module."""
    graph = node.graph
    is_attention = node.target is F.scaled_dot_product_attention
    rate = argument(node, 4, "dropout_p") if is_attention else None
    if not (rate and training) and flag_of(node) is not training:
        return
    path = next(iter(reversed(node.meta[_STACK])), "")
    modules = dict(root.named_modules())
    while path and path not in modules:
        path = path.rpartition(".")[0]
    with graph.inserting_before(node):
        mode = graph.create_node("get_attr", joined_path(path, "training"))
        mode.meta = dict(node.meta)
        if is_attention:
            mode = graph.call_function(operator.mul, (rate, mode))
    place, name = (4, "dropout_p") if is_attention else FLAGS[node.target]
    if len(node.args) > place:
        node.update_arg(place, mode)
    else:
        node.update_kwarg(name, mode)


def _compare(source: nn.Module, made: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Run both on the example inputs of the export, from equal random states and buffers.

    Raises:
        CaptureError: the results differ in a bit.
    """
    buffers = {path: buffer.clone() for path, buffer in made.named_buffers()}

    def run(model: nn.Module) -> list[Any]:
        with preserved_random_state(), torch.no_grad():
            torch.manual_seed(0)
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, example)
            found: list[Any] = pytree.tree_leaves(model(*args, **kwargs))
            found += [buffer.clone() for _, buffer in made.named_buffers()]
            for path, buffer in made.named_buffers():
                buffer.copy_(buffers[path])
        return found

    results = zip(run(source), run(made), strict=True)
    if not all(
        torch.equal(expected, found) if isinstance(expected, Tensor) else expected == found
        for expected, found in results
    ):
        raise CaptureError(
            "the graph made of the exported program does not compute what the program does for its example "
            "inputs; export the model with torch.export.export and without decompositions, or give "
            "biofx.transform the model itself"
        )
