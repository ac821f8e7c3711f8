"""Tensors that are sharded over the ranks of a run (FSDP2), and this rank's part of them.

A sharded weight is a ``DTensor``. Tensors with an entry for each of its synapses are sharded like the weight;
those with an entry for each unit, as signs, are small and whole on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is sharded over ranks."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares memory with it; all of it if it is not sharded."""
    shard: Any = tensor
    part: Tensor = shard.to_local() if is_sharded(tensor) else tensor
    return part


def gathered(tensor: Tensor) -> Tensor:
    """Return all of a tensor, detached; all ranks must call it together."""
    sharded: Any = tensor.detach()
    full: Tensor = sharded.full_tensor() if is_sharded(tensor) else sharded
    return full


def local_part(values: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor for this rank's part of another, as a view where possible.

    Args:
        values: of the shape of ``like``, or of size 1 along some of its axes, whole or sharded like it; a
            tensor of another rank is returned unchanged.
        like: sharded, or whole: then all of ``values`` is returned.
    """
    if is_sharded(values):
        return local(values) if is_sharded(like) else gathered(values)
    if not is_sharded(like) or values.dim() != like.dim():
        return values
    for axis, (size, start) in enumerate(zip(*_layout(like), strict=True)):
        if values.shape[axis] != 1 and size != values.shape[axis]:
            values = values.narrow(axis, min(start, values.shape[axis] - size), size)
    return values


def spread_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor like another; the part of this rank does not share memory with it.

    A tensor of another size along a sharded axis (factors that many synapses share) stays whole.
    """
    sharded: Any = like
    axes = [placement.dim for placement in sharded.placements if placement.is_shard()]
    if full.dim() != like.dim() or any(full.shape[axis] != like.shape[axis] for axis in axes):
        return full.contiguous()
    from torch.distributed.tensor import DTensor

    part = local_part(full, like).to(local(like.detach()).device).clone(memory_format=torch.contiguous_format)
    stride = torch.empty(full.shape, device="meta").stride()
    made: Tensor = DTensor.from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=full.shape, stride=stride
    )
    return made


def flat_span(tensor: Tensor) -> slice | None:
    """Return the flat positions of this rank's part of a tensor; None if they are not contiguous."""
    if not is_sharded(tensor):
        return slice(0, tensor.numel())
    shape, offset = _layout(tensor)
    if tuple(shape[1:]) != tuple(tensor.shape[1:]):
        return None
    row = tensor.shape[1:].numel()
    start = min(offset[0], tensor.shape[0]) * row
    return slice(start, start + shape[0] * row)


def norm_of_part(part: Tensor, like: Tensor) -> float:
    """Return the L2 norm of all of a tensor from this rank's part of it; all ranks must call it together.

    Args:
        part: this rank's.
        like: sharded like the tensor, or whole.
    """
    if not is_sharded(like):
        return float(part.norm())
    return float(sum_over_ranks(part.square().sum(), like).sqrt())


def sum_over_ranks(value: Tensor, like: Tensor) -> Tensor:
    """Return the sum over the ranks of a value of each part of a tensor; all ranks must call it together.

    Args:
        value: of this rank's part; changed in place.
        like: the tensor; if it is whole, the value is returned unchanged.
    """
    if is_sharded(like):
        sharded: Any = like
        for axis, placement in enumerate(sharded.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(value, group=sharded.device_mesh.get_group(axis))
    return value


def _layout(like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of this rank's part, and its offset along each axis."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = like
    return compute_local_shape_and_global_offset(like.shape, sharded.device_mesh, sharded.placements)
