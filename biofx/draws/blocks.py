"""Work on large tensors block by block: temporaries stay in the cache, and random draws use every core.

torch draws random numbers on the CPU with one thread; blocks with generators of their own draw in parallel.
The blocks, and so the numbers, do not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
        work: called with a slice of the flat tensor; from several threads at once.
        generator: a CPU generator that the blocks' own are seeded from; it advances by one draw per block.
        within: the elements that matter; blocks without any of them are left out. None: all.
    """
    blocks = [slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
    seeds = torch.zeros(len(blocks), dtype=torch.int64)
    if generator is not None:
        seeds.random_(0, None, generator=generator)

    numbers = [
        number
        for number, block in enumerate(blocks)
        if within is None or max(block.start, within.start) < min(block.stop, within.stop)
    ]
    inference = torch.is_inference_mode_enabled()  # which threads do not take over from who starts them

    def run(number: int) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(blocks[number], Generator().manual_seed(int(seeds[number])))

    threads = torch.get_num_threads()
    if threads == 1 or len(numbers) <= 1:
        return [run(number) for number in numbers]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, numbers))


def mean_over(count: int, work: Callable[[slice], Tensor]) -> float:
    """Return the mean of what blocks add up to, in double precision; 0 of nothing.

    Args:
        count: elements in all.
        work: called with a slice of the flat tensor; returns the sum over it, of shape ``()``.
    """
    sums = for_each_block(count, lambda block, _: work(block).double())
    return torch.stack(sums).sum().item() / count if sums else 0.0
