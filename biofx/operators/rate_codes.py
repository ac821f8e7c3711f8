"""Learning-rate factors in one byte each: a factor f is kept as the code c of f = (c + offset) / per_unit.

The codes span the factors that a weight has, and 1. ``per_unit``, the number of codes between 0 and 1, is the
largest power of two for which they suffice, so that decoding is exact, in bfloat16 but for its own rounding,
and 1 is a code; so is 0 where it is among the factors. A factor becomes the nearest code's, which differs by
at most half a step of ``1 / per_unit``; at the two ends, where codes stay inside the span, by less than one.
Uniform factors within 1 ± 0.16 have steps of 1/512, factors all over 0.5 to 2 steps of 1/128.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from biofx.errors import PlasticityError

_LAST = 255
_FINEST = 1 << 16
_BLOCK = 1 << 17  # entries that are decoded at a time: half a megabyte, which stays in the cache


def encode(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of factors, uint8 and shaped like them, and their scale.

    The scale is ``(offset, per_unit)``, int64, on the same device: whole numbers, which no change of a
    model's floating-point type rounds.

    Raises:
        PlasticityError: a factor is NaN or infinite, or they span more than 255.
    """
    least, most = (float(bound) for bound in factors.detach().float().aminmax())
    if not (math.isfinite(least) and math.isfinite(most)):
        raise PlasticityError("expected learning-rate factors to encode, found some that are NaN or infinite")
    low, high = min(least, 1.0), max(most, 1.0)
    per_unit = _FINEST
    while per_unit >= 1:
        offset, top = math.ceil(low * per_unit), math.floor(high * per_unit)
        if top - offset <= _LAST:
            scaled = (factors.detach().float() * per_unit).round_().sub_(offset)
            codes = scaled.clamp_(0, top - offset).to(torch.uint8)
            return codes, torch.tensor([offset, per_unit], device=factors.device)
        per_unit //= 2
    raise PlasticityError(
        f"expected learning-rate factors that span no more than 255, found {least:g} to {most:g}; keep them "
        "as numbers (fuzzy_lr_dtype='float32')"
    )


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the factors, float32 and shaped like ``codes``, dimensionless."""
    # whole numbers up to 2**17, and a division by a power of two: nothing is rounded
    return codes.to(torch.float32).add_(scale[0]).div_(scale[1])


def factors_of(held: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return factors in another type, from codes and their scale, or from numbers where there is no scale."""
    return (held if scale is None else decode(held, scale)).to(dtype)


def multiply(values: Tensor, held: Tensor, scale: Tensor | None, *, out: Tensor) -> Tensor:
    """Write ``values`` times the factors to ``out``, which may be ``values``, and return it.

    The factors are decoded, or converted, block by block, never all at once.

    Args:
        values: of the shape of ``held``, or one that it broadcasts to.
        held: codes as :func:`encode` gives them, or factors.
        scale: as :func:`encode` gives it, None for factors.
        out: shaped like ``values``.
    """
    if held.numel() <= _BLOCK or held.dim() != values.dim() or len(held) != len(values):
        return torch.mul(values, factors_of(held, scale, values.dtype), out=out)
    step = max(1, _BLOCK * len(held) // held.numel())
    for start in range(0, len(held), step):
        rows = slice(start, start + step)
        torch.mul(values[rows], factors_of(held[rows], scale, values.dtype), out=out[rows])
    return out


def rounded(factors: Tensor, low: float, high: float) -> Tensor:
    """Return factors in bfloat16, each the nearest such number between the bounds, which enclose 1."""
    nearest = factors.to(torch.bfloat16)
    least, most = (torch.tensor(bound, dtype=torch.bfloat16) for bound in (low, high))
    least = torch.nextafter(least, torch.ones_like(least)) if float(least) < low else least
    most = torch.nextafter(most, torch.ones_like(most)) if float(most) > high else most
    return nearest.clamp_(float(least), float(most))
