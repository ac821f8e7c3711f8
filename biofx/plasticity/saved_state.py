"""What a saved state of one weight's plasticity is made into before it is loaded.

Older versions saved counts as tensors of their own, and what crystallization had dampened as factors; and
clients average state dicts, which makes other numbers of whole ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biofx.errors import PlasticityError
from biofx.plasticity.rate_forms import DRAW, FACTORS
from biofx.plasticity.rule_memory import RuleMemory

if TYPE_CHECKING:
    from biofx.plasticity.bio_state import BioState

SIGNS = ("sign", "local_sign")
EXTRA = "_extra_state"
OLDER = ("steps", "events", "target_strength")
"""Names that older versions saved, and that are in the extra state now."""
_DIVERSITY = "diversity"
_NEAR = 1e-3


def with_current_keys(state: BioState, saved: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return a saved state with the keys that this version has; ``state`` takes what no key is for now.

    Args:
        state: what is to load it.
        saved: of a model, from this version or an older one; it is not changed.
        prefix: how the keys of ``state`` begin.
    """
    kept = dict(saved)
    older = {name: kept.pop(prefix + name, None) for name in OLDER}
    counts = [older["steps"], older["events"]]
    if any(value is not None for value in older.values()) and not any(map(_is_average, counts)):
        steps, events = (0 if count is None else int(count) for count in counts)
        memory = RuleMemory(steps, events, older["target_strength"])
        kept.setdefault(prefix + EXTRA, memory.to_tensor(state.units))
    for name in SIGNS:  # older versions had none of units that only a free weight reads
        own = state._buffers[name]
        if own is not None:
            kept.setdefault(prefix + name, own)
    factors, diversity = kept.get(prefix + FACTORS), kept.get(prefix + _DIVERSITY)
    if not isinstance(factors, Tensor) or state.parameter is None or state.is_drawn:
        return kept
    held, own = state.kept_factors, state._buffers[_DIVERSITY]
    if own is not None and diversity is None:  # saved before anything was dampened
        kept[prefix + _DIVERSITY] = factors
    if factors.shape != state.parameter.shape or (held is not None and held.shape == factors.shape):
        return kept
    if held is None:  # all factors were 1, and crystallization dampened some
        if diversity is None and bool((factors <= 1).all()):
            state.memory.dampening = kept.pop(prefix + FACTORS).to(state.parameter.device)
        return kept
    shared = held if diversity is None else diversity
    if shared.shape == held.shape:  # factors that several synapses share, dampened for each by itself
        kept.pop(prefix + _DIVERSITY, None)
        kept[prefix + FACTORS] = shared
        shared = shared.to(factors.device)
        state.memory.dampening = torch.where(shared > 0, factors / shared, 1.0).to(state.parameter.device)
    return kept


def without_averages(state: BioState, saved: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return a saved state in which whole numbers are whole again.

    What factors are drawn from means nothing once it is averaged: ``state`` keeps its own. Signs are rounded.

    Raises:
        PlasticityError: signs of models whose units have different ones were averaged.
    """
    kept = dict(saved)
    draw = state._buffers[DRAW]
    if draw is not None and _is_average(kept.get(prefix + DRAW)):
        kept[prefix + DRAW] = draw
    for name in SIGNS:
        own, signs = state._buffers[name], kept.get(prefix + name)
        if own is None or not isinstance(signs, Tensor) or own.shape != signs.shape or signs.is_meta:
            continue
        rounded = signs.to(own.dtype).round()
        apart = (rounded - signs).abs() > _NEAR
        if signs.is_floating_point() and bool(rounded.any()) and not own.is_meta:
            apart |= (rounded == 0) & (own.to(signs.device) != 0)
        if bool(apart.any()):
            raise PlasticityError(
                f"{name}: expected -1, 0 or 1 for each unit, found {int(apart.sum())} of "
                f"{signs.numel()} that are none or cancel out, as in an average of models with different "
                "signs; average models that were made with the same seed or given signs"
            )
        kept[prefix + name] = rounded
    return kept


def _is_average(value: Any) -> bool:
    """Whether what is a whole number by itself has become another one."""
    return isinstance(value, Tensor) and value.is_floating_point()
