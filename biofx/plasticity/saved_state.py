"""What a weight's state is saved as, and how a saved state is converted before it is loaded.

Learning-rate factors are kept in one of the forms of :data:`biofx.config.RATE_DTYPES`, and a model may load
those of another form. Older versions saved counts as tensors of their own, and dampened factors as factors.
Averages of state dicts turn whole numbers into others. All functions take a state's entries by their names in
the state, and change none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from biofx.config import FROM_SEED
from biofx.errors import PlasticityError
from biofx.operators.rate_sampling import RateSampling
from biofx.plasticity.rule_memory import RuleMemory

FACTORS, DRAW = "fuzzy_learning_rate_parameters", "fuzzy_learning_rate_draw"
RATE_BUFFERS = (FACTORS, DRAW)
DIVERSITY = "diversity"
SIGNS = ("sign", "local_sign")
MASK = "connection_mask"
UTILITY = "utility"
HELD_BACK = ("importance", "anchor_weight", "task_importance", "initial_weight")
"""What is kept of each synapse to hold it back."""
EXTRA = "_extra_state"
OLDER = ("steps", "events", "target_strength")
"""Names that older versions saved, and that are in the extra state now."""
_CODES = "fuzzy_learning_rate_codes"
"""Where version 0.1.0 kept factors in a byte each."""
_NEAR = 1e-3
"""How far an average of equal signs may be from them, by rounding."""

Held: TypeAlias = Mapping[str, Tensor | None]
"""Buffers by name; absent ones are None or left out."""


# forms of learning-rate factors


def form_of(held: Held) -> str | None:
    """Return the form of factors, None where there are none; other dtypes count as float32."""
    factors = held.get(FACTORS)
    if held.get(DRAW) is not None:
        return FROM_SEED
    if factors is None:
        return None
    return "bfloat16" if factors.dtype is torch.bfloat16 else "float32"


def factors_of(held: Held, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Return factors of any form, None where there are none.

    Args:
        held: stored factors, or the numbers that they are sampled from.
        shape: of the weight.
        device: where factors are sampled to.

    Raises:
        PlasticityError: the numbers are something else.
    """
    numbers = held.get(DRAW)
    return held.get(FACTORS) if numbers is None else RateSampling.from_tensor(numbers).factors(shape, device)


def stored_as(form: str, factors: Tensor, low: float, high: float) -> Tensor:
    """Return factors as they are stored.

    Args:
        form: one of :data:`biofx.config.STORED_RATE_DTYPES`.
        factors: dimensionless.
        low: lower bound of the factors, which rounding does not pass; at most 1.
        high: upper bound, likewise; at least 1.
    """
    if form != "bfloat16":
        return factors.to(torch.promote_types(factors.dtype, torch.float32))
    nearest = factors.to(torch.bfloat16)
    least, most = (torch.tensor(bound, dtype=torch.bfloat16) for bound in (low, high))
    least = torch.nextafter(least, torch.ones_like(least)) if float(least) < low else least
    most = torch.nextafter(most, torch.ones_like(most)) if float(most) > high else most
    return nearest.clamp_(float(least), float(most))


def converted(
    saved: Held,
    form: str | None,
    sampling: RateSampling | None,
    *,
    shape: torch.Size,
    low: float,
    high: float,
) -> Held:
    """Return saved factors in the form in which a layer keeps its own.

    Args:
        saved: in any form; returned unchanged if it has the form already, or if either has none.
        form: the layer's.
        sampling: what the layer samples its factors from, if it does not store them.
        shape: of the weight.
        low: the layer's lower bound.
        high: the layer's upper bound.

    Raises:
        PlasticityError: the layer samples its factors, and they differ from the saved ones.
    """
    given = form_of(saved)
    if sampling is not None and given is not None:
        _check_sampled(saved, sampling, shape, low, high)
        return {DRAW: sampling.to_tensor(_device(saved))}
    if given is None or form is None or given == form:
        return saved
    factors = factors_of(saved, shape, _device(saved))
    if factors is None:
        return saved
    least, most = (float(bound) for bound in factors.aminmax())
    # crystallization goes below the bounds of the sampling
    low, high = low if low <= least else 0.0, high if most <= high else math.inf
    return {FACTORS: stored_as(form, factors, low, high)}


def _check_sampled(saved: Held, sampling: RateSampling, shape: torch.Size, low: float, high: float) -> None:
    """Check that saved factors are those that a layer samples, except for the rounding of their form."""
    factors = saved.get(FACTORS)
    if saved.get(DRAW) is None and factors is not None:
        expected = stored_as(str(form_of(saved)), sampling.factors(shape, factors.device), low, high)
        is_same = torch.equal(factors, expected.to(factors.dtype))
    else:
        is_same = RateSampling.from_tensor(cast(Tensor, saved[DRAW])) == sampling
    if not is_same:
        raise PlasticityError(
            f"expected the factors that {sampling.describe()} draws, found others: from another seed or "
            "distribution, or changed since; make the model with the options that these were drawn with, or "
            "store them (fuzzy_lr_dtype='float32')"
        )


def _device(held: Held) -> torch.device:
    return next(tensor.device for tensor in held.values() if tensor is not None)


# older versions


def refuse_codes(keys: Iterable[object]) -> None:
    """Refuse a saved state whose factors are codes of a byte each, which are no longer read.

    Args:
        keys: of the state dict.

    Raises:
        PlasticityError: there are codes.
    """
    codes = [key for key in keys if str(key).rpartition(".")[2] == _CODES]
    if codes:
        raise PlasticityError(
            f"expected learning-rate factors in float32, bfloat16 or from their seed, found {codes[0]!r} of "
            "fuzzy_lr_dtype='uint8', which was removed ('seed' needs less memory, and rules can change "
            "'bfloat16'); biofx 0.1.0 reads them: load the file there with "
            "biofx.load(path, model, fuzzy_lr_dtype='bfloat16'), and save it again"
        )


def with_current_keys(
    saved: Mapping[str, Any], own: Held, weight: Tensor | None, units: int
) -> tuple[dict[str, Any], Tensor | None]:
    """Return a saved state with the keys of this version, and the dampening that an older one had in factors.

    Args:
        saved: from this version or an older one.
        own: the buffers of the state that is to load it.
        weight: None where it is computed.
        units: of the weight, a count.
    """
    kept = dict(saved)
    older = {name: kept.pop(name, None) for name in OLDER}
    counts = [older["steps"], older["events"]]
    if any(value is not None for value in older.values()) and not any(map(_is_average, counts)):
        steps, events = (0 if count is None else int(count) for count in counts)
        kept.setdefault(EXTRA, RuleMemory(steps, events, older["target_strength"]).to_tensor(units))
    for name in SIGNS:  # older versions had no signs of units that only a free weight reads
        if (signs := own[name]) is not None:
            kept.setdefault(name, signs)
    factors, diversity, held = kept.get(FACTORS), kept.get(DIVERSITY), own[FACTORS]
    if not isinstance(factors, Tensor) or weight is None or own[DRAW] is not None:
        return kept, None
    if own[DIVERSITY] is not None and diversity is None:  # saved before anything was dampened
        kept[DIVERSITY] = factors
    if factors.shape != weight.shape or (held is not None and held.shape == factors.shape):
        return kept, None
    if held is None:
        if diversity is not None or not bool((factors <= 1).all()):
            return kept, None
        return kept, kept.pop(FACTORS).to(weight.device)  # of factors of 1
    shared = held if diversity is None else diversity
    if shared.shape != held.shape:
        return kept, None
    kept.pop(DIVERSITY, None)  # factors that several synapses share, each dampened for itself
    kept[FACTORS] = shared
    shared = shared.to(factors.device)
    return kept, torch.where(shared > 0, factors / shared, 1.0).to(weight.device)


# averages


def without_averages(saved: Mapping[str, Any], own: Held) -> dict[str, Any]:
    """Return a saved state in which whole numbers are whole again.

    An average of what factors are sampled from is replaced by ``own``. Signs and masks are rounded.

    Raises:
        PlasticityError: signs of models whose units have different ones were averaged.
    """
    kept = dict(saved)
    if own[DRAW] is not None and _is_average(kept.get(DRAW)):
        kept[DRAW] = own[DRAW]
    if isinstance(mask := kept.get(MASK), Tensor) and mask.is_floating_point() and not mask.is_meta:
        kept[MASK] = mask.round()
    for name in SIGNS:
        mine, signs = own[name], kept.get(name)
        if mine is None or not isinstance(signs, Tensor) or mine.shape != signs.shape or signs.is_meta:
            continue
        rounded = signs.to(mine.dtype).round()
        apart = (rounded - signs).abs() > _NEAR
        if signs.is_floating_point() and bool(rounded.any()) and not mine.is_meta:
            apart |= (rounded == 0) & (mine.to(signs.device) != 0)
        if bool(apart.any()):
            raise PlasticityError(
                f"{name}: expected -1, 0 or 1 for each unit, found {int(apart.sum())} of "
                f"{signs.numel()} that are none or cancel out, as in an average of models with different "
                "signs; average models that were made with the same seed or given signs"
            )
        kept[name] = rounded
    return kept


def _is_average(value: Any) -> bool:
    """Whether a whole number has become another one."""
    return isinstance(value, Tensor) and value.is_floating_point()
