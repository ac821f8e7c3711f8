"""Rules on weights that are spread over the ranks of a run (FSDP2).

A sharded weight is a ``DTensor``. Factors and signs are kept whole on every rank and act on the part of the
weight that is there, so that a step asks nothing of the other ranks. A rule that must see the whole weight
gathers it when it is due: every rank then does the same with the same random numbers, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.plasticity.bio_state import BioState
from biofx.plasticity.moments import FIRST_MOMENTS


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over ranks."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is on this rank; it shares memory with the tensor."""
    shard: Any = tensor
    part: Tensor = shard.to_local() if is_sharded(tensor) else tensor
    return part


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that belongs to the part of ``like`` on this rank, as a view.

    Args:
        full: of the shape of ``like``, or of size 1 along some of its axes; any tensor of fewer axes than
            ``like`` is returned as it is.
        like: sharded, or whole, which makes it all of ``full``.
    """
    if not is_sharded(like) or full.dim() != like.dim():
        return full
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = like
    shape, offset = compute_local_shape_and_global_offset(like.shape, sharded.device_mesh, sharded.placements)
    for axis, (size, start) in enumerate(zip(shape, offset, strict=True)):
        if full.shape[axis] != 1 and size != full.shape[axis]:
            full = full.narrow(axis, min(start, full.shape[axis] - size), size)
    return full


def norm_of_part(part: Tensor, like: Tensor) -> float:
    """Return the L2 norm of all of a tensor from this rank's part of it; all ranks must ask together.

    Args:
        part: on this rank.
        like: sharded as the tensor is, or whole.
    """
    if not is_sharded(like):
        return float(part.norm())
    sharded: Any = like
    total = part.square().sum()
    torch.distributed.all_reduce(total, group=sharded.device_mesh.get_group())
    return float(total.sqrt())


@contextmanager
def whole(state: BioState, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Let a layer have its whole weight, gradient and first moments for a while.

    All ranks must do it together; of what is written, each rank keeps its part.
    """
    weight = state.parameter
    if weight is None or not is_sharded(weight):
        yield
        return
    owner, name = state.get_parent(), state.path.rpartition(".")[2]
    full = nn.Parameter(_gathered(weight), requires_grad=weight.requires_grad)
    if weight.grad is not None:
        full.grad = _gathered(weight.grad)
    moments = {} if optimizer is None else optimizer.state.get(weight, {})
    gathered = {key: _gathered(moments[key]) for key in FIRST_MOMENTS if is_sharded(moments.get(key))}
    if optimizer is not None and gathered:
        optimizer.state[full] = gathered
    owner._parameters[name] = full
    try:
        yield
    finally:
        owner._parameters[name] = weight
        if optimizer is not None:
            optimizer.state.pop(full, None)
        with torch.no_grad():
            _keep(full, weight)
            if weight.grad is not None and full.grad is not None:
                _keep(full.grad, weight.grad)
            for key, moment in gathered.items():
                _keep(moment, moments[key])


def _gathered(tensor: Tensor) -> Tensor:
    sharded: Any = tensor.detach()
    full: Tensor = sharded.full_tensor()
    return full


def _keep(full: Tensor, sharded: Tensor) -> None:
    local(sharded.detach()).copy_(local_part(full, sharded))
