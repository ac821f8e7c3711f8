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
    is_second: bool = False
    """Whether it is one at second axes alone, where other axes happen to have the same size."""

    def resized(self, given: Any, size: int) -> Any:
        """Return the example with another size here: its entries from the start, over and over."""
        return pytree.tree_map_only(Tensor, lambda tensor: self._resized(tensor, size), given)

    def _resized(self, tensor: Tensor, size: int) -> Tensor:
        places = torch.arange(size) % self.size
        for axis, found in enumerate(tensor.shape):
            is_here = axis == 1 if self.is_second else (axis == 0) == self.is_first
            if found == self.size and is_here:
                tensor = tensor.index_select(axis, places.to(tensor.device))
        return tensor


def axes_of(given: Any) -> list[Axis]:
    """Return the axes of an example, those first at whose sizes a model is likeliest to work.

    That of the first axes comes first, then those that occur most and furthest to the front.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    found = [(axis, size) for tensor in tensors for axis, size in enumerate(tensor.shape)]
    sizes = Counter(Axis(axis == 0, size) for axis, size in sorted(found))
    ordered = sorted(sizes, key=lambda axis: (not axis.is_first, -sizes[axis]))
    second = {size for axis, size in found if axis == 1} & {size for axis, size in found if axis > 1}
    return [axis for axis in (*ordered, *(Axis(False, size, True) for size in sorted(second))) if axis.size]


def is_of_samples(axis: Axis, found: Any, with_first_again: Any) -> bool:
    """Whether what a model returns for each entry of an axis is the same whatever other entries there are.

    Args:
        axis: the axis in question.
        found: the output for the example.
        with_first_again: the output where the first entry comes once more, at the end.
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


def sizes_asked_about(graphs: Iterable[Graph], axis: Axis) -> list[int]:
    """Return numbers of samples at which a question of the model has another answer, or may have.

    Where a question is one about a size and numbers, its answer is worked out; else it may have another
    around the numbers in it, and at sizes that divide otherwise.
    """
    most = max(2 * axis.size, _MOST_SAMPLES)
    wanted: set[int] = set()
    for check in (c for g in graphs for c in g.find_nodes(op="call_function", target=require_same)):
        asked = check.args[0]
        if not isinstance(asked, Node) or not _reads_a_size(asked, first=axis.is_first):
            continue
        answers = [_answer(asked, size) for size in range(1, most + 1)]
        if None in answers:
            wanted |= {3, axis.size - 1, axis.size + 1}
            wanted |= {number + step for number in _numbers_in(asked) for step in (-1, 0, 1)}
        else:
            others = [size for size, answer in enumerate(answers, 1) if answer != check.args[1]]
            wanted |= {*others[:1], *others[-1:]}
    return sorted(size for size in wanted - {1, axis.size, 2 * axis.size} if 1 < size <= most)


def _answer(asked: Any, size: int) -> Any:
    """Return what a question about one size and numbers gives at a size; None if it is another question."""
    if not isinstance(asked, Node):
        return asked
    if asked.target in ("size", len) or asked.op != "call_function":
        return size if asked.target in ("size", len) else None
    operands = [_answer(operand, size) for operand in asked.args]
    if asked.kwargs or not all(type(operand) in (int, float, bool) for operand in operands):
        return None
    try:
        return asked.target(*operands)  # type: ignore[operator]
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
