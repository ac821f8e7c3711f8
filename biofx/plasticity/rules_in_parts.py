"""Rules on a sharded weight that need not gather it: each rank works on its part, to the bit as one process.

That is but for the last few entries of a part, which kernels of torch round apart from the others where a
part does not fill their registers.

Which rules do so for which weights says :meth:`BioModule.acts_in_parts
<biofx.plasticity.bio_module.BioModule.acts_in_parts>`. Beside its part of the weight a rank has in memory
at most two blocks of :data:`~biofx.operators.sampling.BLOCK` elements, and of rejuvenation the new weights of
all ranks, 8 bytes for each that is replaced.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from biofx.errors import NonFiniteWeightError, PlasticityError
from biofx.operators.parts import local
from biofx.operators.sampling import BLOCK
from biofx.plasticity.initial_weights import InitialWeights
from biofx.plasticity.optimizers import FIRST_MOMENTS
from biofx.plasticity.owned_blocks import OwnedBlocks, mean_of_blocks
from biofx.plasticity.rate_rules import multiply_blocks_by_volume
from biofx.plasticity.rejuvenation import new_weights, weak_in_blocks
from biofx.plasticity.shards import flat_span, sum_over_ranks


@torch.no_grad()
def volume_factors_of_part(weight: Tensor, masked: Tensor, connections: int | None, **options: Any) -> Tensor:
    """Return this rank's part of what :func:`~biofx.plasticity.rate_rules.volume_factors` returns.

    Args:
        weight: sharded.
        masked: this rank's part of it, 0 where no connection exists.
        connections: how many exist, None for all.
        options: ``base``, ``stability``, ``variability`` and ``generator``, as there.
    """
    blocks, flat = OwnedBlocks(weight), masked.reshape(-1)
    borrowed = blocks.borrow(flat)
    mean = mean_of_blocks(blocks, lambda block: borrowed[block].abs().sum(dtype=torch.float32))
    if connections is not None:
        mean *= weight.numel() / max(1, connections)
    scale = max(mean, torch.finfo(flat.dtype).tiny)
    factors = torch.ones_like(masked, memory_format=torch.contiguous_format)
    multiply_blocks_by_volume(
        factors.view(-1), flat, scale, place=blocks.place, total=blocks.total, **options
    )
    return factors


@torch.no_grad()
def scale_inputs_of_part(weight: Tensor, masked: Tensor, target: Tensor | None, rate: float) -> Tensor:
    """Do synaptic scaling of the units of this rank, in place; return the target of all units.

    Args:
        weight: sharded along its units, ``(units, *)``.
        masked: this rank's part of it, 0 where no connection exists.
        target: total strength of each unit, ``(units,)``; None to take what there is.
        rate: how much of the way to go.
    """
    part, width = local(weight.detach()), max(1, weight.shape[1:].numel())
    first = (flat_span(weight) or slice(0, 0)).start // width
    units = slice(first, first + len(part))
    total = masked.abs().flatten(1).sum(1)
    if target is None:
        target = torch.zeros(weight.shape[0], dtype=total.dtype, device=total.device)
        target[units] = total
        sum_over_ranks(target, weight)
    moved = torch.where(total > 0, 1 + rate * (target[units] / total - 1), torch.ones_like(total))
    part.copy_(masked).mul_(moved.reshape(-1, *(1,) * (part.dim() - 1)).to(part))
    return target


@torch.no_grad()
def check_part(weight: Tensor, name: str) -> None:
    """Check that every weight of all ranks is a number.

    Raises:
        NonFiniteWeightError: some are not.
        PlasticityError: they are complex.
    """
    if weight.is_complex():
        raise PlasticityError(f"{name}: expected real weights to rejuvenate, found {weight.dtype}")
    wrong = int(sum_over_ranks((~local(weight.detach()).isfinite()).sum(), weight))
    if wrong:
        raise NonFiniteWeightError(
            f"{name}: expected finite weights to rejuvenate, found {wrong} that are NaN or infinite; "
            "lower the learning rate or clip the gradient, and start from a sound checkpoint"
        )


@torch.no_grad()
def rejuvenate_part(
    weight: nn.Parameter,
    *,
    protection: float,
    generator: Generator,
    sign: Tensor | None,
    initial: InitialWeights | None,
    optimizer: Optimizer | None,
    name: str,
) -> int:
    """Replace weak weights as :func:`~biofx.plasticity.rejuvenation.rejuvenate` does; return how many.

    All ranks must call it together.

    Args:
        weight: sharded.
        protection: d, in standard deviations of the weights.
        generator: a CPU generator, the only source of randomness.
        sign: broadcastable to the whole weight; +1, -1, or 0 for free.
        initial: what new weights are drawn from.
        optimizer: its first moments of the replaced synapses become 0.
        name: what an error calls the weight.
    """
    check_part(weight, name)
    part, blocks = local(weight.detach()), OwnedBlocks(weight)
    borrowed = blocks.borrow(part.view(-1))
    mean = mean_of_blocks(blocks, lambda block: borrowed[block].sum(dtype=torch.float32))

    def squares(block: slice) -> Tensor:
        apart = borrowed[block].float() - mean
        return apart.dot(apart)

    scale = math.sqrt(mean_of_blocks(blocks, squares)) / protection
    if scale == 0:
        return 0
    found = weak_in_blocks(borrowed, scale, generator, total=blocks.total, within=blocks.owned)
    rows = [torch.cat([torch.tensor([float(len(places))]), kept, every]) for places, kept, every in found]
    everything = blocks.collect([row.double() for row in rows], 7)
    moments = _in_order(everything[:, 1:4])
    if not moments[0]:
        moments = _in_order(everything[:, 4:])
    counts = everything[:, 0].long()
    total = int(counts.sum())
    if not total:
        return 0
    first = blocks.owned.start // BLOCK
    before = int(counts[:first].sum())
    places = torch.cat([each for each, _, _ in found]) if found else torch.empty(0, dtype=torch.int64)
    places = places.to(part.device)
    fixed = None
    if sign is not None:  # of all that are replaced, for signs and magnitudes are drawn together
        fixed = torch.zeros(total, dtype=torch.float32, device=part.device)
        fixed[before : before + len(places)] = sign.expand(weight.shape).take(places).float()
        torch.distributed.all_reduce(fixed, group=blocks.group)
    new = new_weights(total, moments, fixed, generator, initial).to(part)
    borrowed.put(places, new[before : before + len(places)])
    gone = torch.zeros(part.numel(), dtype=torch.uint8, device=part.device)
    blocks.borrow(gone).put(places, torch.ones(len(places), dtype=torch.uint8, device=part.device))
    state: Any = {} if optimizer is None else optimizer.state.get(weight, {})
    for key in FIRST_MOMENTS:
        moment = state.get(key)
        if isinstance(moment, Tensor) and moment.shape == weight.shape:
            local(moment).view(-1).masked_fill_(gone.bool(), 0)
    return total


def _in_order(rows: Tensor) -> Tensor:
    """Return the sum of the rows, added one after the other as one process does."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row in rows:
        total = total + row
    return total
