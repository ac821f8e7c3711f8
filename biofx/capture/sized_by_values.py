"""Which functions of torch return as much as the values of a tensor say.

What Python decides by such a size, or a loop over such a result, may go another way on every input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_ALWAYS = frozenset(
    {
        *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "_unique2", "bincount"),
        *("unique_dim", "histc", "combinations", "repeat_interleave", "tensor_split", "segment_reduce"),
        *("_pack_padded_sequence", "_pad_packed_sequence", "to_sparse"),
    }
)
_TAKE_SIZES = frozenset(
    {
        *("arange", "range", "linspace", "logspace", "zeros", "ones", "full", "empty", "eye", "rand"),
        *("randn", "randint", "randperm", "tril_indices", "triu_indices", "new_zeros", "new_ones"),
        *("new_full", "new_empty", "expand", "view", "reshape", "repeat", "tile", "broadcast_to", "narrow"),
        *("split", "chunk", "unflatten", "pad"),
    }
)
_OWN_NAMESPACES = ("aten", "prims", "biofx")
_MANY = frozenset({"unbind", "split", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit", "__iter__"})


def is_sized_by_values(function: Any, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the size of what a function returns depends on the values of a tensor."""
    name = name.partition(".")[0]
    if name == "__getitem__":
        return any(_counts_or_bounds(index) for index in leaves(args[1]))
    if name == "one_hot":  # as many classes as there are, unless told
        return len(args) == 1 and kwargs.get("num_classes", -1) == -1
    if name == "where":
        return len(args) == 1
    if name in _TAKE_SIZES:
        return any(_is_a_whole_number(size) for size in leaves((args, kwargs)))
    return name in _ALWAYS or _is_not_from_torch(function)


def gives_as_many_as_there_are(name: str) -> bool:
    """Whether a function returns a tuple whose length depends on the size of a tensor."""
    return name.partition(".")[0] in _MANY


def _counts_or_bounds(index: Any) -> bool:
    if isinstance(index, slice):
        return any(isinstance(bound, Tensor) for bound in (index.start, index.stop, index.step))
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_a_whole_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point()


def _is_not_from_torch(function: Any) -> bool:
    """Whether it is an operator that somebody registered, of which nothing is known."""
    qualified = getattr(function, "_qualified_op_name", None) or getattr(function, "_name", None)
    return isinstance(qualified, str) and qualified.partition("::")[0] not in _OWN_NAMESPACES


def leaves(value: Any) -> Iterator[Any]:
    """Yield what lies in lists, tuples and dictionaries."""
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from leaves(entry)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value
