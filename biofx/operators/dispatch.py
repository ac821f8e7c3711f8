"""How the functions of rewritten graphs are called: recorded as one call, or run as they are.

A rewritten graph outlives the process that made it: it is pickled, traced again, compiled, exported, vmapped.
The functions keep their effect through all of these, in two ways:

* they are :func:`overridable`, so that a tracer records *one* call instead of looking inside (or, worse,
  running it once);
* their backward is either ordinary differentiable arithmetic or, wherever a graph is recorded below autograd,
  a registered ``torch.library`` operator. A bare ``torch.autograd.Function`` would be dropped there silently.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import handle_torch_function, has_torch_function

from biofx.errors import PlasticityError
from biofx.operators.arriving import is_computed_in_parts
from biofx.torch_private import functorch_is_active

P = ParamSpec("P")
Result = TypeVar("Result")


def overridable(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let a tracer or a tensor subclass among the arguments take the call whole, as torch's functions do."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def dispatched(*args: P.args, **kwargs: P.kwargs) -> Result:
        given: tuple[Any, ...] = (*args, *kwargs.values())
        for entry in given:
            if type(entry) in (list, tuple):
                given = (*given, *entry)
        if has_torch_function(given):
            bound = signature.bind(*args, **kwargs)
            result: Result = handle_torch_function(dispatched, given, *bound.args, **bound.kwargs)
            return result
        return function(*args, **kwargs)

    return dispatched


def is_recorded() -> bool:
    """Whether operators are recorded: compiled, exported, or traced below autograd."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def is_recorded_below_autograd() -> bool:
    """Whether operators are recorded below autograd, which then never sees an autograd function."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return get_proxy_mode() is not None


_DETACH = torch.ops.aten.detach.default
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of a size in bytes."""


def held_back(value: Tensor) -> Tensor:
    """Return a tensor through which no gradient passes, also when a recorded graph is differentiated again.

    ``make_fx`` writes ``alias`` for ``detach`` (since torch 2.15, unless it is told otherwise), and gradients
    pass through that; they pass through no integers.
    """
    mode: Any = None if torch.compiler.is_compiling() else get_proxy_mode()
    if _DETACH not in getattr(mode, "decomposition_table", ()):
        return value.detach()
    if value.is_complex():
        return torch.view_as_complex(held_back(torch.view_as_real(value)))
    return value.view(_INTEGERS[value.element_size()]).view(value.dtype)


def is_plain_eager() -> bool:
    """Whether operators run as they are called, on plain tensors, so that a kernel may be chosen."""
    return not is_recorded() and not functorch_is_active()


_HOSTS = {"cpu"}
"""Types of devices whose values are there at once."""


def is_on_host(tensor: Tensor) -> bool:
    """Whether values of a tensor can be read without waiting: for a device, all that it was told to do.

    A training step asks nothing of tensors elsewhere, but by rules at the steps at which they run.
    """
    return tensor.device.type in _HOSTS


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is spread over ranks."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


def refuse_shard(weight: Tensor) -> None:
    """Refuse a sharded weight, where torch would say that it cannot mix two kinds of tensors.

    A weight of a layer that is computed in parts (tensor parallel) is none.

    Raises:
        PlasticityError: the weight is sharded.
    """
    if hasattr(weight, "device_mesh") and not is_computed_in_parts(weight):
        raise PlasticityError(
            f"expected a whole weight, found one of shape {tuple(weight.shape)} that is sharded: the graph "
            "reads weights without calling their layers; shard the model as a whole, fully_shard(bio_model)"
        )


def outside_graphs(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function, wrapped to break the graph while one is compiled, as all of FSDP does."""
    if not torch.compiler.is_compiling():
        return function
    interrupting: Callable[..., Result] = torch.compiler.disable(function)
    return interrupting
