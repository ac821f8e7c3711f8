"""Changes of modules after their capture that a graph would not follow: they are told of, and never nothing.

A graph has inline what some of its modules do, and does not call them. What each of them was then is kept
with the graph (:class:`biofx.model.taken_in.Taken`) and compared with what stands in its place now.
"""

from __future__ import annotations

import functools
import weakref
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized

from biofx.errors import BiofxError, CaptureError, InputError
from biofx.layers.layer_kind import hooks_of
from biofx.model.attribute_guards import refuse_changed_attributes
from biofx.model.called_again import STATE_OF_WEIGHT, Become, call_again, find_again
from biofx.model.graph_places import Places, held_at, module_at
from biofx.model.standing import Standing, kinds_of_tensors, operands_of
from biofx.model.taken_in import SAME, STATE, Taken, same_for_graph, same_twice
from biofx.plasticity.ranks import is_fully_sharded

_INLINE = "The graph has what it did inline, and does not call it"
_COMPACT = "Splits are folded here, and the graph calls it with one value for all synapses of a connection"
_REMEDY = (
    "change the model before it is transformed, and transform it anew, or change what biofx.deploy returns"
)


def following_changes(forward: Any, owner: Any, become: Become) -> Any:
    """Return a forward of a graph module that first looks whether all is as it was when it was captured.

    What compiles a model looks once, when it compiles. The forward has the globals of the one it was given,
    where ``torch.jit.script`` looks names up.
    """
    held = weakref.ref(owner)

    def looked() -> bool:
        return follow_late_changes(held(), become)

    vars(looked)["_dynamo_marked_constant"] = (
        True  # torch.compiler.assume_constant_result imports the compiler
    )

    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        changed = looked() if is_compiling() else look(self, become) or type(self)._latest is not made
        if changed:  # now, or since somebody got hold of this forward
            return type(self)._latest(self, *args, **kwargs)
        check(self)
        return forward(self, *args, **kwargs)

    is_compiling, look, check = torch.compiler.is_compiling, follow_late_changes, refuse_changed_attributes
    made = FunctionType(followed.__code__, forward.__globals__, forward.__name__, None, followed.__closure__)
    return functools.update_wrapper(made, forward)


def remember_modules(graph_module: GraphModule) -> Places:
    """Keep, with a graph module, what its graph takes over from the modules that it does not call."""
    places = Places.of(graph_module)
    kept: dict[str, Taken] = vars(graph_module).setdefault(STATE, {})
    for path in places.passed:
        module = module_at(graph_module, path)
        if path not in kept and module is not None:
            kept[path] = Taken.of(module)
    if SAME not in vars(graph_module):
        vars(graph_module)[SAME] = same_twice(graph_module)
    return places


def follow_late_changes(graph_module: Any, become: Become) -> bool:
    """Look whether the modules of a graph are what they were; return whether the graph is another one now.

    Raises:
        CaptureError: one of them is not, and the graph would go on doing what it did.
        InputError: one of them has a hook, which would never run.
    """
    kind = type(graph_module)
    standing: Standing | None = kind._standing
    if standing is not None and standing.holds(graph_module):
        return False
    kind._places = remember_modules(graph_module)
    changed = False
    while (found := _first_difference(graph_module)) is not None:
        path, error = found
        if not call_again(graph_module, path, become) and not find_again(graph_module):
            raise error
        changed = True
    kind._standing = Standing.of(graph_module, kind._places)
    return changed


def _first_difference(graph_module: GraphModule) -> tuple[str, BiofxError] | None:
    """Return where something is not as it was, and what to say of it if nothing can be done."""
    kept: dict[str, Taken] = vars(graph_module)[STATE]
    places: Places = type(graph_module)._places  # type: ignore[attr-defined]
    for path in places.passed:
        module, named = module_at(graph_module, path), f"module {path!r}" if path else "the model"
        if module is None:
            layer, state, _ = path.partition(f".{STATE_OF_WEIGHT}")
            message = _replaced(layer, "state") if state else f"{named} is no longer there"
            return path, _changed(message)
        is_run = path in places.inline
        is_compact = path in places.compact
        difference = kept[path].difference(
            module, is_run=is_run or is_compact, is_root=not path, is_compact=is_compact
        )
        if difference is not None:
            message = f"{named} was changed since the model was captured: {difference}"
            return path, _changed(message, _COMPACT if is_compact else _INLINE)
        if is_run and path and not is_fully_sharded(module) and (hooks := hooks_of(module)):
            error = _hooked(module, path, hooks)
            if "weight" not in vars(module):  # else a hook computes it, as of torch.nn.utils.prune
                raise error
            return path, error
        if path in places.repeated and is_parametrized(module) and not kept[path].is_computed:
            message = f"{named} has a parametrization now, which is asked at each of its calls"
            return path, _changed(message, "The graph reads the weight once for all of them")
    for first, other in same_for_graph(graph_module, places.used):
        if held_at(graph_module, first) is not held_at(graph_module, other):
            message = f"{other!r} was the same as {first!r} when the model was captured, and is not any more"
            return other, _changed(message, "The graph takes them for one")
    for path in places.called:
        if module_at(graph_module, path) is None:
            return path, _changed(f"module {path!r}, which the graph calls, is no longer there")
    for path in places.read:
        owner_path, _, name = path.rpartition(".")
        owner = module_at(graph_module, owner_path)
        if owner is None or not _has(owner, name):
            return owner_path, _changed(_missing(owner_path, name))
    for path, table, name in operands_of(graph_module, places):
        if type(table.get(name)) not in kinds_of_tensors():
            return path.rpartition(".")[0], _changed(
                f"{path!r} is a {type(table.get(name)).__name__} now, and the graph does something to it "
                "before it is used"
            )
    return None


def _missing(owner: str, name: str) -> str:
    layer, _, state = owner.rpartition(".")
    if state == STATE_OF_WEIGHT:
        return _replaced(layer, name)
    return f"module {owner!r} has no {name!r} any more, which the graph reads"


def _replaced(layer: str, state: str) -> str:
    return (
        f"module {layer!r} was replaced since the model was captured: the {state} is gone that is kept for a "
        "weight of the layer that was there"
    )


def _changed(message: str, why: str = _INLINE) -> CaptureError:
    return CaptureError(f"{message}. {why}: {_REMEDY}")


def _hooked(module: nn.Module, path: str, hooks: list[str]) -> InputError:
    return InputError(
        f"module {path!r} ({type(module).__name__}) has {' and '.join(hooks)}, which "
        "would never run: the graph has what the module does, and does not call it. Take them off, "
        f"or register them on the model before it is transformed, with opaque=[{path!r}]"
    )


def _has(owner: nn.Module, name: str) -> bool:
    """Whether a module has something, which is not computed to find out."""
    tables: tuple[Any, ...] = (vars(owner), owner._parameters, owner._buffers, owner._modules)
    return any(name in table for table in tables) or hasattr(type(owner), name)
