"""Numbers that hang together by pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def smallest_connected(count: int, pairs: Tensor) -> Tensor:
    """Return for each of ``count`` numbers the smallest one that pairs connect it with, directly or not.

    Args:
        count: how many numbers there are.
        pairs: ``(2, pairs)``, int64.

    >>> smallest_connected(5, torch.tensor([[3, 4], [1, 3]])).tolist()
    [0, 1, 2, 1, 1]
    """
    smallest = torch.arange(count)
    while True:
        ends = smallest[pairs]
        low, high = ends.amin(0), ends.amax(0)
        if torch.equal(low, high):
            return smallest
        smallest = smallest.scatter_reduce(0, high, low, "amin")
        while not torch.equal(shorter := smallest[smallest], smallest):
            smallest = shorter
