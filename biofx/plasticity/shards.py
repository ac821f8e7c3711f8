"""Tensors that are sharded over the ranks of a run (FSDP2), and this rank's part of them.

A sharded weight is a ``DTensor``. Tensors with an entry for each of its synapses are sharded like the weight;
those with an entry for each unit, as signs, are small and whole on every rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.operators.parts import gathered, is_sharded, layout_of, local, local_part


@contextmanager
def whole_parameters(
    places: Iterable[tuple[nn.Module, str]], optimizer: Optimizer | None = None, names: Collection[str] = ()
) -> Iterator[None]:
    """Gather parameters, their gradients, and what an optimizer remembers; at the end ranks keep their parts.

    All ranks must do it together.

    Args:
        places: modules, and the names of their parameters; those that are not sharded stay.
        optimizer: of the parameters.
        names: of what it remembers.
    """
    gathered_ones: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
    moments: list[tuple[Tensor, Tensor]] = []
    done: dict[int, nn.Parameter] = {}
    for owner, name in places:
        part = owner._parameters[name]
        if part is None or id(part) in done or not is_sharded(part):
            continue
        full = done[id(part)] = nn.Parameter(gathered(part), requires_grad=part.requires_grad)
        if part.grad is not None:
            full.grad = gathered(part.grad)
        held = {} if optimizer is None else optimizer.state.get(part, {})
        kept = {key: gathered(held[key]) for key in names if is_sharded(held.get(key))}
        if optimizer is not None and kept:
            optimizer.state[full] = kept
        moments += [(full_moment, held[key]) for key, full_moment in kept.items()]
        gathered_ones.append((owner, name, full, part))
        owner._parameters[name] = full
    try:
        yield
    finally:
        for owner, name, full, part in gathered_ones:
            owner._parameters[name] = part
            if optimizer is not None:
                optimizer.state.pop(full, None)
            keep_part(full, part)
            if part.grad is not None and full.grad is not None:
                keep_part(full.grad, part.grad)
        for full_moment, moment in moments:
            keep_part(full_moment, moment)


@contextmanager
def whole_buffers(states: Iterable[nn.Module], names: Collection[str]) -> Iterator[None]:
    """Gather buffers that are sharded; at the end ranks keep their parts. All ranks must do it together."""
    parts: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    for state in states:
        for name in names:
            held = state._buffers.get(name)
            if held is not None and is_sharded(held):
                full = state._buffers[name] = gathered(held)
                parts.append((state, name, full, held))
    try:
        yield
    finally:
        for state, name, full, held in parts:
            keep_part(full, held)
            state._buffers[name] = held


@torch.no_grad()
def keep_part(full: Tensor, sharded: Tensor) -> None:
    """Write this rank's part of a whole tensor to a sharded one."""
    local(sharded.detach()).copy_(local_part(full, sharded))


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
    shape, offset = layout_of(tensor)
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
