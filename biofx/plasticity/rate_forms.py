"""The forms that a layer keeps its learning-rate factors in, and the ways between them.

A form is one of :data:`biofx.config.RATE_DTYPES`. The buffers of a form, by name, are what is *held*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from biofx.config import FROM_SEED
from biofx.errors import PlasticityError
from biofx.operators.rate_sampling import RateSampling

FACTORS = "fuzzy_learning_rate_parameters"
DRAW = "fuzzy_learning_rate_draw"
RATE_BUFFERS = (FACTORS, DRAW)
CODES = "fuzzy_learning_rate_codes"
"""Where version 0.1.0 kept factors in a byte each."""
Held: TypeAlias = Mapping[str, Tensor | None]
"""Buffers by name, those that a form does not have None or left out."""


def form_of(held: Held) -> str | None:
    """Return the form of what is held, None where nothing is; numbers of other types count as float32."""
    factors = held.get(FACTORS)
    if held.get(DRAW) is not None:
        return FROM_SEED
    if factors is None:
        return None
    return "bfloat16" if factors.dtype is torch.bfloat16 else "float32"


def factors_held(held: Held, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Return the factors, None where there are none.

    Args:
        held: in any form.
        shape: of the weight.
        device: where factors are drawn to.
    """
    draw = draw_held(held)
    return held.get(FACTORS) if draw is None else draw.factors(shape, device)


def draw_held(held: Held) -> RateSampling | None:
    """Return what factors are drawn from, None where they are stored or where there are none.

    Raises:
        PlasticityError: what is held for it is something else.
    """
    numbers = held.get(DRAW)
    return None if numbers is None else RateSampling.from_tensor(numbers)


def held_as(form: str, factors: Tensor, low: float, high: float) -> dict[str, Tensor | None]:
    """Return factors in a form that stores them.

    Args:
        form: one of :data:`biofx.config.STORED_RATE_DTYPES`.
        factors: dimensionless.
        low: bounds of the factors, which no rounding leaves.
        high: likewise.
    """
    held: dict[str, Tensor | None] = dict.fromkeys(RATE_BUFFERS)
    if form == "bfloat16":
        held[FACTORS] = rounded(factors, low, high)
    else:
        held[FACTORS] = factors.to(torch.promote_types(factors.dtype, torch.float32))
    return held


def rounded(factors: Tensor, low: float, high: float) -> Tensor:
    """Return factors in bfloat16, each the nearest such number between the bounds, which enclose 1."""
    nearest = factors.to(torch.bfloat16)
    least, most = (torch.tensor(bound, dtype=torch.bfloat16) for bound in (low, high))
    least = torch.nextafter(least, torch.ones_like(least)) if float(least) < low else least
    most = torch.nextafter(most, torch.ones_like(most)) if float(most) > high else most
    return nearest.clamp_(float(least), float(most))


def refuse_codes(keys: Iterable[str]) -> None:
    """Refuse a saved state whose factors are codes of a byte each, which are no longer read.

    Args:
        keys: of the state dict.

    Raises:
        PlasticityError: there are codes.
    """
    codes = [key for key in keys if key.rpartition(".")[2] == CODES]
    if codes:
        raise PlasticityError(
            f"expected learning-rate factors in float32, bfloat16 or from their seed, found {codes[0]!r} of "
            "fuzzy_lr_dtype='uint8', which was removed ('seed' needs less memory, and rules can change "
            "'bfloat16'); biofx 0.1.0 reads them: load the file there with "
            "biofx.load(path, model, fuzzy_lr_dtype='bfloat16'), and save it again"
        )


def converted(saved: Held, own: Held, *, shape: torch.Size, low: float, high: float) -> Held:
    """Return saved factors in the form in which a layer holds its own.

    Args:
        saved: in any form; returned as it is where it has the form already, or where either has none.
        own: what the layer holds.
        shape: of the weight.
        low: the layer's bounds.
        high: likewise.

    Raises:
        PlasticityError: the layer draws its factors from a seed, and others than these.
    """
    given, wanted = form_of(saved), form_of(own)
    if given is None or wanted is None or given == wanted != FROM_SEED:
        return saved
    if wanted != FROM_SEED:
        factors = factors_held(saved, shape, _device(saved))
        if factors is None:
            return saved
        least, most = (float(bound) for bound in factors.aminmax())
        # crystallization leads below the bounds of the draw
        return held_as(wanted, factors, low if low <= least else 0.0, high if most <= high else math.inf)
    _check_drawn(saved, own, shape, low, high)
    return {**dict.fromkeys(RATE_BUFFERS), DRAW: own[DRAW]}


def _check_drawn(saved: Held, own: Held, shape: torch.Size, low: float, high: float) -> None:
    """Check that saved factors are those that the layer draws, but for how their form rounds them."""
    expected, given = draw_held(own), draw_held(saved)
    if expected is None:
        return
    if given is not None:
        same = given == expected
    else:
        drawn = held_as(str(form_of(saved)), expected.factors(shape, _device(saved)), low, high)
        same = all(_equal(saved.get(name), drawn[name]) for name in RATE_BUFFERS)
    if not same:
        raise PlasticityError(
            f"expected the factors that {expected.describe()} draws, found others: from another seed or "
            "distribution, or changed since; make the model with the options that these were drawn with, or "
            "store them (fuzzy_lr_dtype='float32')"
        )


def _equal(saved: Tensor | None, drawn: Tensor | None) -> bool:
    if saved is None or drawn is None:
        return saved is drawn
    return torch.equal(saved, drawn.to(saved.dtype))


def _device(held: Held) -> torch.device:
    return next(tensor.device for tensor in held.values() if tensor is not None)
