"""The example inputs at other sizes, for trial runs of a captured model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from biofx.graph.guards import require_same
from biofx.torch_private import pytree

_MOST_SAMPLES = 64
"""The largest number of samples to try because of a query, a count; or twice as many as the example has."""


@dataclass(frozen=True)
class Axis:
    """One size in the example, wherever it occurs: at first axes, or at others."""

    is_first: bool
    size: int
    is_second: bool = False
    """Whether it is the size at second axes alone, where other axes happen to have the same size."""

    def resized(self, given: Any, size: int) -> Any:
        """Return the example with another size here: its entries from the start, repeated as needed."""
        return pytree.tree_map_only(Tensor, lambda tensor: self._resized(tensor, size), given)

    def _resized(self, tensor: Tensor, size: int) -> Tensor:
        entries = torch.arange(size) % self.size
        for axis, found in enumerate(tensor.shape):
            is_here = axis == 1 if self.is_second else (axis == 0) == self.is_first
            if found == self.size and is_here:
                tensor = tensor.index_select(axis, entries.to(tensor.device))
        return tensor


def axes_of(given: Any) -> list[Axis]:
    """Return the axes of an example, those first at other sizes of which a model is likeliest to work.

    That of the first axes comes first, then those that occur most and furthest to the front.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    found = [(axis, size) for tensor in tensors for axis, size in enumerate(tensor.shape)]
    sizes = Counter(Axis(axis == 0, size) for axis, size in sorted(found))
    ordered = sorted(sizes, key=lambda axis: (not axis.is_first, -sizes[axis]))
    second = {size for axis, size in found if axis == 1} & {size for axis, size in found if axis > 1}
    return [axis for axis in (*ordered, *(Axis(False, size, True) for size in sorted(second))) if axis.size]


def is_of_samples(axis: Axis, found: Any, with_first_again: Any) -> bool:
    """Whether what a model returns for an entry of an axis does not depend on the other entries.

    Args:
        axis: the axis.
        found: the output for the example.
        with_first_again: the output for the example with its first entry once more, at the end.
    """
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(with_first_again), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    if all(a.shape == b.shape for a, b in tensors):
        return False
    return all(_has_first_again(axis.size, a, b) for a, b in tensors)


def _has_first_again(size: int, found: Tensor, with_first_again: Tensor) -> bool:
    expected = found
    for axis, (before, after) in enumerate(zip(found.shape, with_first_again.shape, strict=False)):
        if (before, after) == (size, size + 1):
            expected = torch.cat([expected, expected.narrow(axis, 0, 1)], axis)
    alike = expected.shape == with_first_again.shape and expected.dtype == with_first_again.dtype
    return alike and torch.allclose(expected, with_first_again, equal_nan=True)


def sizes_queried(graphs: Iterable[Graph], axis: Axis) -> list[int]:
    """Return numbers of samples at which a size check of some graphs has another result, or may have.

    The result of a check of one size and numbers is computed. That of another may change around the numbers
    in it, and at sizes with other divisors.
    """
    most = max(2 * axis.size, _MOST_SAMPLES)
    wanted: set[int] = set()
    for check in (c for g in graphs for c in g.find_nodes(op="call_function", target=require_same)):
        query = check.args[0]
        if not isinstance(query, Node) or not _reads_a_size(query, first=axis.is_first):
            continue
        results = [_result(query, size) for size in range(1, most + 1)]
        if None in results:
            wanted |= {3, axis.size - 1, axis.size + 1}
            wanted |= {number + step for number in _numbers_in(query) for step in (-1, 0, 1)}
        else:
            others = [size for size, result in enumerate(results, 1) if result != check.args[1]]
            wanted |= {*others[:1], *others[-1:]}
    return sorted(size for size in wanted - {1, axis.size, 2 * axis.size} if 1 < size <= most)


def _result(query: Any, size: int) -> Any:
    """Return the value of an expression of one size and numbers, None if it holds anything else."""
    if not isinstance(query, Node):
        return query
    if query.target in ("size", len) or query.op != "call_function":
        return size if query.target in ("size", len) else None
    operands = [_result(operand, size) for operand in query.args]
    if query.kwargs or not all(type(operand) in (int, float, bool) for operand in operands):
        return None
    try:
        return query.target(*operands)  # type: ignore[operator]
    except Exception:
        return None


def _reads_a_size(node: Node, *, first: bool) -> bool:
    if node.op == "call_method" and node.target in ("size", "numel"):
        return not first or node.target == "numel" or node.args[1:] in ((0,), ())
    if node.target is len:
        return True
    return node.op == "call_function" and any(_reads_a_size(n, first=first) for n in node.all_input_nodes)


def _numbers_in(node: Node) -> Iterator[int]:
    for argument in node.args:
        if type(argument) is int:
            yield argument
        elif isinstance(argument, Node) and argument.op == "call_function":
            yield from _numbers_in(argument)
