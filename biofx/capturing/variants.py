"""The example at other sizes, at which a captured model is tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from biofx.graph.guards import require_same

_MOST_SAMPLES = 64
"""How many samples a question may lead to, at most; a count. Or twice as many as the example has."""


@dataclass(frozen=True)
class Axis:
    """One size in the example, wherever it occurs: at first axes, or at others."""

    is_first: bool
    size: int

    def resized(self, given: Any, size: int) -> Any:
        """Return the example with another size here; its samples from the start, over and over.

        One sample alone is the last one.
        """
        return pytree.tree_map_only(Tensor, lambda tensor: self._resized(tensor, size), given)

    def _resized(self, tensor: Tensor, size: int) -> Tensor:
        places = torch.arange(size) % self.size if size > 1 else torch.tensor([self.size - 1])
        for axis, found in enumerate(tensor.shape):
            if found == self.size and (axis == 0) == self.is_first:
                tensor = tensor.index_select(axis, places.to(tensor.device))
        return tensor


def axes_of(given: Any) -> list[Axis]:
    """Return the axes of an example, those first at whose sizes a model is likeliest to work.

    That of the first axes comes first, then those that occur most and furthest to the front.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    found = [(axis, size) for tensor in tensors for axis, size in enumerate(tensor.shape)]
    sizes = Counter(Axis(axis == 0, size) for axis, size in sorted(found))
    return sorted((axis for axis in sizes if axis.size), key=lambda axis: (not axis.is_first, -sizes[axis]))


def is_of_samples(axis: Axis, together: Any, alone: Any) -> bool:
    """Whether what a model returns for the last sample alone is what it returns for it among the others.

    Args:
        axis: the axis in question.
        together: the output for all.
        alone: the output for the last one.
    """
    pairs = list(zip(pytree.tree_leaves(together), pytree.tree_leaves(alone), strict=False))
    shapes = [(a.shape, b.shape) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    if all(a == b for a, b in shapes):
        return False
    return all(_is_last_of(axis.size, a, b) for a, b in pairs if isinstance(a, Tensor))


def _is_last_of(size: int, together: Tensor, alone: Any) -> bool:
    if not isinstance(alone, Tensor) or alone.dim() != together.dim():
        return False
    for axis, (found, one) in enumerate(zip(together.shape, alone.shape, strict=True)):
        if found == size and one == 1:
            together = together.narrow(axis, size - 1, 1)
    alike = together.shape == alone.shape and together.dtype == alone.dtype
    return alike and torch.allclose(together, alone, equal_nan=True)


def sizes_asked_about(graphs: Iterable[Graph], axis: Axis) -> list[int]:
    """Return numbers of samples at which a question of the model may have another answer.

    They are those around the numbers with which the graphs compare a size, and some that divide otherwise.
    """
    compared = {
        number
        for graph in graphs
        for check in graph.find_nodes(op="call_function", target=require_same)
        if isinstance(check.args[0], Node) and _reads_a_size(check.args[0], first=axis.is_first)
        for number in _numbers_in(check.args[0])
    }
    if not compared:
        return []
    wanted = {3, axis.size - 1, axis.size + 1}
    wanted |= {number + step for number in compared for step in (-1, 0, 1)}
    most = max(2 * axis.size, _MOST_SAMPLES)
    return sorted(size for size in wanted - {1, axis.size, 2 * axis.size} if 1 < size <= most)


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
    yield 1
