"""Random numbers that depend on what they are for, never on what was sampled before.

Large tensors are worked on block by block: temporaries stay in the cache, and each block has a generator of
its own. The blocks, and so the numbers, do not depend on the number of threads: one thread runs the blocks
one after another, and torch's operations on a block use all threads.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Generator, Tensor

BLOCK = 1 << 17
"""Elements of a block."""
LEVELS = 1 << 16
Result = TypeVar("Result")


def generator_for(seed: int, path: str, event: int = 0, *, purpose: str = "") -> Generator:
    """Return a CPU generator keyed by seed, parameter path, event number and purpose.

    Equal keys give equal numbers on every rank, on every device and after a resume; the global generator is
    not consumed.

    Args:
        seed: the user's seed.
        path: path of the parameter that the numbers belong to.
        event: how many events of this kind came before, a count.
        purpose: keeps numbers for different purposes of one parameter apart.
    """
    return Generator().manual_seed(key_for(seed, path, event, purpose=purpose))


def key_for(seed: int, path: str, event: int = 0, *, purpose: str = "") -> int:
    """Return the number below 2**63 that :func:`generator_for` seeds its generator with."""
    key = f"{seed}\0{purpose}\0{path}\0{event}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


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
        generator: a CPU generator that seeds those of the blocks; it advances by one number a block.
        within: the elements that are needed; blocks without any of them are skipped. None: all.
    """
    blocks = [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    seeds = torch.zeros(len(blocks), dtype=torch.int64)
    if generator is not None:
        seeds.random_(0, None, generator=generator)

    with torch.no_grad():
        return [
            work(block, Generator().manual_seed(seed))
            for block, seed in zip(blocks, seeds.tolist(), strict=True)
            if within is None or max(block.start, within.start) < min(block.stop, within.stop)
        ]


def handed_over(drawn: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return sampled numbers on a device, without waiting for it.

    Args:
        drawn: on the CPU, where all numbers are sampled, so that they are the same on every device.
        device: where to.
        dtype: what to convert them to, there; None for their own.
    """
    if device.type == "cuda":  # from memory that may move, the copy would be waited for
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True).to(drawn.dtype if dtype is None else dtype)


def mean_over(count: int, work: Callable[[slice], Tensor]) -> float:
    """Return the mean over the elements of all blocks, in double precision; 0 if there are none.

    Args:
        count: elements in all.
        work: called with a slice of the flat tensor; returns the sum over it, of shape ``()``.
    """
    sums = for_each_block(count, lambda block, _: work(block).double())
    return torch.stack(sums).sum().item() / count if sums else 0.0


def random_levels(count: int, generator: Generator) -> Tensor:
    """Sample whole numbers from 0 to 65535, all equally likely.

    Several times faster than torch samples floats; for noise on noise, and for chances, where neither the
    tails nor the last digits matter.

    Args:
        count: how many.
        generator: a CPU generator, the only source of randomness.

    Returns:
        uint16 of shape ``(count,)`` on the CPU.
    """
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.uint16)[:count]


def sampled_from(table: Tensor, count: int, generator: Generator) -> Tensor:
    """Sample entries of a table, all equally likely, as fast as :func:`random_levels`.

    Args:
        table: shape ``(65536,)``, on the CPU, such as :func:`normal_quantiles` or a function of it.
        count: how many.
        generator: a CPU generator, the only source of randomness.

    Returns:
        Shape ``(count,)``, on the CPU.
    """
    return table.index_select(0, random_levels(count, generator).int())


@functools.cache
def normal_quantiles() -> Tensor:
    """Return the medians of 65536 equally likely intervals of N(0, 1).

    A sample of them has mean 0, variance 1 - 2e-5, and no value beyond 4.33.

    Returns:
        float32 of shape ``(65536,)`` on the CPU, in ascending order.
    """
    medians: Tensor = torch.special.ndtri((torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS)
    return medians.float()
