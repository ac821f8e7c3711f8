"""Normal noise, twice as fast as torch draws it: a table of quantiles, looked up with 16 random bits."""

from __future__ import annotations

import functools

import torch
from torch import Generator, Tensor

_LEVELS = 1 << 16


def standard_normal(count: int, generator: Generator) -> Tensor:
    """Draw from N(0, 1) at 65536 levels: mean 0, variance 1 - 2e-5, no value beyond 4.33.

    For noise on noise, where neither the tails nor the last digits matter.

    Args:
        count: how many.
        generator: a CPU generator, the only source of randomness.

    Returns:
        float32 of shape ``(count,)`` on the CPU.
    """
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return _quantiles().index_select(0, words.view(torch.uint16)[:count].int())


@functools.cache
def _quantiles() -> Tensor:
    """Return the medians of 65536 equally likely intervals."""
    medians: Tensor = torch.special.ndtri((torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS)
    return medians.float()
