"""Tensors that are spread over the ranks of a run (``DTensor``), and this rank's part of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from biofx.torch_private import local_shape_and_offset


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over ranks."""
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
    for axis, (size, start) in enumerate(zip(*layout_of(like), strict=True)):
        if values.shape[axis] != 1 and size != values.shape[axis]:
            values = values.narrow(axis, min(start, values.shape[axis] - size), size)
    return values


def layout_of(like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of this rank's part of a sharded tensor, and its offset along each axis."""
    sharded: Any = like
    return local_shape_and_offset(like.shape, sharded.device_mesh, sharded.placements)


def is_laid_out_like(values: Tensor, like: Tensor) -> bool:
    """Whether two sharded tensors lie on the ranks of one mesh."""
    sharded: Any = values
    other: Any = like
    return bool(sharded.device_mesh == other.device_mesh)


def on_parts(function: Callable[..., Tensor], weight: Tensor, *others: Tensor) -> Tensor:
    """Return what an operation makes of a sharded weight, entry by entry; each rank computes its part.

    Args:
        function: of this rank's part of the weight and of the others; it returns one shaped like the first.
        weight: sharded; it is differentiated.
        others: as :func:`local_part` takes them.
    """
    from torch.distributed.tensor import DTensor

    sharded: Any = weight
    made = function(local(weight), *(local_part(other, weight) for other in others))
    spread: Tensor = DTensor.from_local(
        made,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return spread
