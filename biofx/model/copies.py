"""Copies of modules, as ``copy.deepcopy`` makes them, in less time and of models that it refuses."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def deep_copy(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Return a copy of a module, ``copy.deepcopy(module, memo)`` after :func:`prepared`."""
    return copy.deepcopy(module, prepared(module, {} if memo is None else memo))


def prepared(module: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Fill in what some things that a module holds are copied to.

    A module holds a dozen tables of hooks, nearly all of them empty, on which ``copy.deepcopy`` spends most
    of its time. And it refuses modules of Python, of which there is but one, and tensors that were computed,
    which hooks such as those of ``torch.nn.utils.weight_norm`` leave in a layer and compute anew at every
    call; their values are copied, and not what they were computed from.

    Args:
        module: what is to be copied.
        memo: of ``copy.deepcopy``; filled in place.

    Returns:
        ``memo``.
    """
    for inner in module.modules():
        for value in (*vars(inner).values(), *inner._buffers.values()):
            if type(value) is OrderedDict and not value:
                memo.setdefault(id(value), OrderedDict())
            elif type(value) is ModuleType:
                memo.setdefault(id(value), value)
            elif issubclass(type(value), Tensor) and value.grad_fn is not None:
                memo.setdefault(id(value), value.detach().clone())
    return memo
