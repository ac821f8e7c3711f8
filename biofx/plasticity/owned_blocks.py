"""A sharded weight block by block: each block is on the rank in whose part it begins, and no rank has all.

Rules work on flat weights in blocks of :data:`~biofx.operators.sampling.BLOCK` elements (512 KiB of float32),
each with random numbers of its own. Parts of ranks do not end where blocks do. So a rank is lent the rest of
its last block by those that follow it, and gives it back changed: nothing else is sent, and what is computed
of a block is what one process computes of it, to the bit. Sums over blocks are collected and added in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed

from biofx.operators.parts import is_sharded, local
from biofx.operators.sampling import BLOCK
from biofx.plasticity.shards import flat_span


class OwnedBlocks:
    """The blocks of a sharded weight that this rank works on.

    Args:
        weight: one for which :func:`lies_in_blocks` is true.
    """

    def __init__(self, weight: Tensor) -> None:
        sharded: Any = weight
        axis = next(n for n, placement in enumerate(sharded.placements) if placement.is_shard())
        self.group = sharded.device_mesh.get_group(axis)
        """The ranks that share the weight out."""
        self._rank, count = sharded.device_mesh.get_local_rank(axis), sharded.device_mesh.size(axis)
        rows, width = weight.shape[0], weight.shape[1:].numel()
        share = -(-rows // count)
        edges = [min(rank * share, rows) * width for rank in range(count + 1)]
        self._spans = [slice(*pair) for pair in pairwise(edges)]
        self.total = weight.numel()
        """Elements of the whole weight, a count."""
        self.place = self._spans[self._rank]
        """Flat positions of this rank's part."""
        self.owned = self._owned_by(self._rank)
        """Flat positions of the blocks that begin in it."""
        self.device = local(weight.detach()).device

    def __len__(self) -> int:
        return self.total

    def _owned_by(self, rank: int) -> slice:
        span = self._spans[rank]
        start, stop = (min(-(-edge // BLOCK) * BLOCK, self.total) for edge in (span.start, span.stop))
        return _span(start, stop) if span.stop > span.start else _span(start, start)

    def _sent(self, rank: int, to: int) -> slice:
        """Return what a rank lends another: positions of its part that lie in blocks of the other."""
        if rank == to:
            return slice(0, 0)
        span, owned = self._spans[rank], self._owned_by(to)
        return _span(max(span.start, owned.start), min(span.stop, owned.stop))

    def borrow(self, part: Tensor) -> BorrowedBlocks:
        """Return the blocks of a tensor shaped like the weight; all ranks must call it together.

        Args:
            part: this rank's, flat.
        """
        ranks = range(len(self._spans))
        given = [self._sent(self._rank, to) for to in ranks]
        taken = [self._sent(source, self._rank) for source in ranks]
        lent = torch.cat(
            [part[span.start - self.place.start : span.stop - self.place.start] for span in given]
        )
        rest = part.new_empty(sum(map(_length, taken)))
        self._exchange(lent, rest, given, taken)
        return BorrowedBlocks(self, part, rest)

    def give_back(self, part: Tensor, rest: Tensor) -> None:
        """Write what others have changed of this rank's part; all ranks must call it together."""
        ranks = range(len(self._spans))
        given = [self._sent(self._rank, to) for to in ranks]
        taken = [self._sent(source, self._rank) for source in ranks]
        back = part.new_empty(sum(map(_length, given)))
        self._exchange(rest, back, taken, given)
        for span, piece in zip(given, back.split([*map(_length, given)]), strict=True):
            part[span.start - self.place.start : span.stop - self.place.start] = piece

    def _exchange(
        self, sent: Tensor, received: Tensor, given: Sequence[slice], taken: Sequence[slice]
    ) -> None:
        distributed.all_to_all_single(
            received, sent, [*map(_length, taken)], [*map(_length, given)], group=self.group
        )

    def collect(self, rows: Sequence[Tensor], width: int) -> Tensor:
        """Return what each rank has found of its blocks, in the order of the blocks, float64 on the CPU.

        All ranks must call it together.

        Args:
            rows: of each of this rank's blocks in order, ``(width,)``.
            width: numbers of a block.
        """
        everything = torch.zeros(-(-self.total // BLOCK), width, dtype=torch.float64, device=self.device)
        first = self.owned.start // BLOCK
        if rows:
            everything[first : first + len(rows)] = torch.stack([*rows]).reshape(-1, width).to(everything)
        distributed.all_reduce(everything, group=self.group)
        return everything.cpu()


class BorrowedBlocks:
    """The blocks of one tensor, indexed by flat positions in the whole of it."""

    def __init__(self, blocks: OwnedBlocks, part: Tensor, rest: Tensor) -> None:
        self._blocks, self._part, self._rest = blocks, part, rest
        place, owned = blocks.place, blocks.owned
        end = place.stop
        start = min(max(owned.start, (max(end, 1) - 1) // BLOCK * BLOCK), end) if len(rest) else end
        self._joint = start
        self._last = torch.cat([part[start - place.start :], rest]) if len(rest) else part[:0]

    def __len__(self) -> int:
        return len(self._blocks)

    def numel(self) -> int:
        """Return the elements of the whole tensor, a count."""
        return len(self)

    def __getitem__(self, block: slice) -> Tensor:
        offset = self._joint if block.start >= self._joint and len(self._last) else self._blocks.place.start
        source = self._last if block.start >= self._joint and len(self._last) else self._part
        return source[block.start - offset : block.stop - offset]

    def put(self, places: Tensor, values: Tensor) -> None:
        """Write values to flat positions of this rank's blocks, and give those of others back.

        All ranks must call it together.
        """
        place = self._blocks.place
        late = places >= self._joint if len(self._last) else torch.zeros_like(places, dtype=torch.bool)
        self._part[places[~late] - place.start] = values[~late]
        if len(self._last):
            self._last[places[late] - self._joint] = values[late]
            own = place.stop - self._joint
            self._part[self._joint - place.start :] = self._last[:own]
            self._rest = self._last[own:]
        self._blocks.give_back(self._part, self._rest)


def lies_in_blocks(weight: Tensor) -> bool:
    """Whether a weight is sharded along its first axis over one dimension of a mesh, as FSDP2 and HSDP do."""
    if not is_sharded(weight):
        return False
    sharded: Any = weight
    shards = [placement for placement in sharded.placements if not placement.is_replicate()]
    part = local(weight.detach())
    return (
        len(shards) == 1 and shards[0].is_shard(0) and part.is_contiguous() and flat_span(weight) is not None
    )


def mean_of_blocks(blocks: OwnedBlocks, work: Callable[[slice], Tensor]) -> float:
    """Return the mean over all elements of a sharded tensor, as ``sampling.mean_over`` does of a whole one.

    All ranks must call it together.

    Args:
        blocks: of the tensor.
        work: called with the flat positions of each of this rank's blocks; returns the sum over it.
    """
    owned = blocks.owned
    starts = range(owned.start, owned.stop, BLOCK)
    sums = [work(slice(start, min(start + BLOCK, blocks.total))).double() for start in starts]
    return float(blocks.collect(sums, 1).flatten().sum()) / blocks.total if blocks.total else 0.0


def _span(start: int, stop: int) -> slice:
    return slice(start, max(start, stop))


def _length(span: slice) -> int:
    return int(span.stop - span.start)
