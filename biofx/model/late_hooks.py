"""Hooks that were registered on a module after its capture, and that its graph would never run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.fx import Graph

from biofx.errors import InputError
from biofx.layers.obstacles import hooks_of
from biofx.plasticity.sharded_model import is_fully_sharded


def paths_inline(graph: Graph) -> tuple[str, ...]:
    """Return the paths of the modules whose operations a graph has inline, and which it does not call."""
    places = {
        str(place) for node in graph.nodes for place, _ in (node.meta.get("nn_module_stack") or {}).values()
    }
    called = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    return tuple(sorted(places - called - {""}))


def refuse_late_hooks(graph_module: nn.Module, paths: Iterable[str]) -> None:
    """Refuse to run a graph without the hooks of the modules at ``paths``, whose calls it does not make.

    Raises:
        InputError: one of them has a hook. There was none when the model was captured.
    """
    for path in paths:
        try:
            module = graph_module.get_submodule(path)
        except AttributeError:  # taken out since, as what deployed models leave behind
            continue
        has_hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        if has_hooks and not is_fully_sharded(module):  # whose hooks are seen to where the model is called
            raise InputError(
                f"module {path!r} ({type(module).__name__}) has {' and '.join(hooks_of(module))}, which "
                "would never run: the graph has what the module does, and does not call it. Take them off, "
                f"or register them on the model before it is transformed, with opaque=[{path!r}]"
            )
