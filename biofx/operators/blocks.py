"""Work on large tensors block by block: temporaries stay in the cache, and each block has draws of its own.

The blocks, and so the numbers, do not depend on how many threads there are. One thread runs them one after
another, and torch's operations on a block use all: in threads of ours each would start as many again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Generator, Tensor

_BLOCK = 1 << 17
Result = TypeVar("Result")


def for_each_block(
    count: int,
    work: Callable[[slice, Generator], Result],
    generator: Generator | None = None,
    *,
    within: slice | None = None,
) -> list[Result]:
    """Return ``work(block, its own generator)`` for consecutive blocks of ``count`` elements, in order.

    Args:
        count: elements in all.
        work: called with a slice of the flat tensor, under ``torch.no_grad``.
        generator: a CPU generator that the blocks' own are seeded from; it advances by one draw per block.
        within: the elements that matter; blocks without any of them are left out. None: all.
    """
    blocks = [slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
    seeds = torch.zeros(len(blocks), dtype=torch.int64)
    if generator is not None:
        seeds.random_(0, None, generator=generator)

    with torch.no_grad():
        return [
            work(block, Generator().manual_seed(int(seed)))
            for block, seed in zip(blocks, seeds, strict=True)
            if within is None or max(block.start, within.start) < min(block.stop, within.stop)
        ]


def multiply_by_blocks(values: Tensor, factors: Tensor, *, out: Tensor) -> Tensor:
    """Write ``values`` times the factors to ``out``, which may be ``values``, and return it.

    Factors of another type are converted block by block, never all at once.

    Args:
        values: of the shape of ``factors``, or one that it broadcasts to.
        factors: dimensionless.
        out: shaped like ``values``.
    """
    if factors.numel() <= _BLOCK or factors.dim() != values.dim() or len(factors) != len(values):
        return torch.mul(values, factors.to(values.dtype), out=out)
    step = max(1, _BLOCK * len(factors) // factors.numel())
    for start in range(0, len(factors), step):
        rows = slice(start, start + step)
        torch.mul(values[rows], factors[rows].to(values.dtype), out=out[rows])
    return out


def mean_over(count: int, work: Callable[[slice], Tensor]) -> float:
    """Return the mean of what blocks add up to, in double precision; 0 of nothing.

    Args:
        count: elements in all.
        work: called with a slice of the flat tensor; returns the sum over it, of shape ``()``.
    """
    sums = for_each_block(count, lambda block, _: work(block).double())
    return torch.stack(sums).sum().item() / count if sums else 0.0
