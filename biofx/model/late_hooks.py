"""Hooks that were registered on a module after its capture, and that its graph would never run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.fx import Graph

from biofx.errors import InputError
from biofx.layers.obstacles import hooks_of
from biofx.plasticity.sharded_model import is_fully_sharded


def paths_inline(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """Return the paths, part by part, of the modules that a graph has inline and does not call."""
    places = {
        str(place) for node in graph.nodes for place, _ in (node.meta.get("nn_module_stack") or {}).values()
    }
    called = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    return tuple(tuple(place.split(".")) for place in sorted(places - called - {""}))


def refuse_late_hooks(graph_module: nn.Module, paths: Iterable[tuple[str, ...]]) -> None:
    """Refuse to run a graph without the hooks of the modules at ``paths``, whose calls it does not make.

    Raises:
        InputError: one of them has a hook. There was none when the model was captured.
    """
    for (
        parts
    ) in paths:  # at every call of the model, so without get_submodule, which takes five times as long
        module: nn.Module | None = graph_module
        for part in parts:
            module = None if module is None else module._modules.get(part)
        if module is None:  # taken out since, as what deployed models leave behind
            continue
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            _refuse(module, ".".join(parts))


def _refuse(module: nn.Module, path: str) -> None:
    if not is_fully_sharded(module):  # whose hooks are seen to where the model is called
        raise InputError(
            f"module {path!r} ({type(module).__name__}) has {' and '.join(hooks_of(module))}, which "
            "would never run: the graph has what the module does, and does not call it. Take them off, "
            f"or register them on the model before it is transformed, with opaque=[{path!r}]"
        )
