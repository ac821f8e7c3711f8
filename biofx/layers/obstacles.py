"""What keeps a layer's call from being replaced by its function on visible weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

from biofx.layers.layer_kinds import LayerKind
from biofx.layers.weight_slots import WeightSlot

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def hooks_of(module: nn.Module) -> list[str]:
    """Return the kinds of hooks registered on a module, readable."""
    return [name.strip("_").replace("_", " ") for name in _HOOKS if getattr(module, name)]


def computed(name: str) -> str:
    """Say that a weight is not a parameter."""
    return f"its {name} is computed by a parametrization, not a parameter"


def is_computed_plainly(module: nn.Module, kind: LayerKind, name: str) -> bool:
    """Whether a layer has one weight, which a parametrization computes, and all else as it was."""
    is_plain = not kind.is_compound and not kind.why_no_units
    return is_plain and is_parametrized(module, name) and "bias" in module._parameters


def obstacle_to_lowering(
    node: Node, module: nn.Module, kind: LayerKind, slots: Iterable[WeightSlot]
) -> str | None:
    """Return why a layer's call cannot be replaced by its function on visible weights, None if it can."""
    if hooks := hooks_of(module):
        return f"it has {' and '.join(hooks)}, which would no longer run"
    for slot in slots:
        owner, _, name = slot.name.rpartition(".")
        held = name in module.get_submodule(owner)._parameters
        if not held and not is_computed_plainly(module, kind, name):
            return computed(slot.name)
    overridden: Iterable[str] = ("forward", "_conv_forward")
    if any(name in vars(module) for name in overridden):
        return "its forward was replaced on the instance"
    if any(getattr(type(module), m, None) is not getattr(kind.module_type, m, None) for m in overridden):
        return f"{type(module).__name__} has a forward of its own, not {kind.name}'s"
    if not (kind.is_compound or kind.why_no_units) and len(node.args) + len(node.kwargs) != 1:
        return "it is called with more than its input (output_size), which its function does not take"
    return None
