"""Turnover of connections: weak ones are pruned, and as many grow where none exists.

Sources: Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta, "Scalable training of artificial neural networks with
adaptive sparse connectivity inspired by network science", Nature Communications 9 (2018), doi
10.1038/s41467-018-04316-3 (SET: growth at random); Evci, Gale, Menick, Castro, Elsen, "Rigging the lottery:
making all tickets winners", ICML 2020, arXiv 1911.11134 (RigL: growth where the gradient is large); which
ones go, and the weights of new ones, as for :mod:`biofx.plasticity.rejuvenation`.

Deviations: SET prunes a fixed share of the weakest, here each goes with the probability that rejuvenation has
for it. A new connection starts with a weight like those that stay, unless asked otherwise, where SET
draws one as at the start and RigL takes 0. The gradient is without learning-rate factors, and 0 where it
would lead a weight away from the sign of its unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from biofx.operators.mask_ops import EXISTS, FORBIDDEN, MISSING, existing
from biofx.plasticity.connections import ConnectionLayout
from biofx.plasticity.initial_weights import InitialWeights
from biofx.plasticity.rejuvenation import check_finite, choose_weak, moments_of, new_weights, spread_of
from biofx.plasticity.selection import BelowMean, LowestShare, Utility, judged


@dataclass(frozen=True)
class Turnover:
    """What one turnover has moved."""

    pruned: int
    """Weights of the connections that vanished, and of those that grew, a count each."""
    places: Tensor
    """Flat positions in the weight of all that vanished or grew, int64."""
    new: Tensor
    """Flat positions in the weight of those that grew where none was, int64."""


@torch.no_grad()
def turn_over(
    weight: Tensor,
    mask: Tensor,
    layout: ConnectionLayout,
    *,
    protection: float,
    generator: Generator,
    blocks: Tensor | None = None,
    gradient: Tensor | None = None,
    sign: Tensor | None = None,
    initial: InitialWeights | None = None,
    utility: Utility | None = None,
    stays: Tensor | None = None,
    selection: LowestShare | BelowMean | None = None,
    name: str = "weight",
) -> Turnover:
    """Move weak connections, in place: each vanishes with probability exp(-d |w| / std(w)), another grows.

    The standard deviation is that of the connections that exist, and |w| of a connection with gates is the
    root mean square of its weights. In each block as many grow as vanish, at random among those that are
    missing then and may exist; one that has vanished may be one of them. New weights are drawn as
    :func:`~biofx.plasticity.rejuvenation.rejuvenate` draws them, and missing ones become 0.

    Args:
        weight: real, floating point; its storage stays.
        mask: shaped like the weight, as :func:`~biofx.operators.mask_ops.mask_weight` takes it.
        layout: of the weight.
        protection: d, in standard deviations of the weights, > 0.
        generator: a CPU generator, the only source of randomness.
        blocks: the block of each connection, int64, ``(units, connections of a unit)``; None for one block.
        gradient: of all connections, shaped like the weight; connections grow where its magnitude (the root
            mean square of the gates') is largest, and their weights descend it where no sign is given.
            Entries that are not finite count as 0. None to grow at random.
        sign: broadcastable to ``weight``; +1, -1, or 0 for free.
        initial: as for :func:`~biofx.plasticity.rejuvenation.rejuvenate`.
        utility: likewise; that of a connection with gates is the root mean square of theirs.
        stays: where weights are never changed, bool, broadcastable to ``weight``; a connection one of whose
            gates stays neither vanishes nor grows.
        selection: how connections are chosen; None for each with its chance.
        name: what an error calls the weight.

    Raises:
        NonFiniteWeightError: the weight of a connection is NaN or infinite; nothing has been changed.
    """
    held = layout.split(mask)[0]
    exists, allowed = existing(held).flatten(), (held > (FORBIDDEN + MISSING) / 2).flatten()
    connections = layout.split(weight.detach()).flatten(1)
    connections = torch.where(exists, connections, 0)
    check_finite(connections, name)
    places, none = exists.nonzero().flatten(), exists.nonzero().flatten()[:0]
    if not len(places):
        return Turnover(0, none, none)
    compared = layout.split(judged(weight, utility, stays)).flatten(1)
    strength = compared[:, places].square().mean(0).sqrt()
    if selection is not None:
        weak = selection.choose(strength, generator)
    else:
        if utility is None:
            scale = spread_of(connections[:, places].flatten()) / protection
        else:
            scale = utility.scale(strength, protection)
        if scale == 0:
            return Turnover(0, none, none)
        weak, _ = choose_weak(strength, scale, generator)
    pruned = places[weak]
    if not len(pruned):
        return Turnover(0, none, none)
    staying = exists.clone()
    staying[pruned] = False
    slopes = None if gradient is None else layout.split(gradient).flatten(1).nan_to_num(0.0, 0.0, 0.0)
    steepness = None if slopes is None else slopes.float().square().mean(0)
    parts = None if blocks is None else blocks.flatten()
    if stays is not None:
        allowed &= ~layout.split(stays.expand(weight.shape)).flatten(1).any(0)
    grown = _grown(allowed & ~staying, pruned, parts, steepness, generator)
    moments = moments_of(connections, staying) if initial is None else None
    fixed = None if slopes is None else -slopes[:, grown].sign().flatten()
    if sign is not None:
        given = layout.split(sign.expand(weight.shape)).flatten(1)[:, grown].flatten()
        fixed = given if fixed is None else torch.where(given == 0, fixed.to(given), given)
    new = new_weights(layout.gates * len(grown), moments, fixed, generator, initial).to(weight)
    moved = torch.zeros_like(exists)
    moved[pruned] = moved[grown] = True
    connections[:, pruned] = 0
    connections[:, grown] = new.reshape(layout.gates, -1)
    values = held.flatten()
    values[pruned] = MISSING
    values[grown] = EXISTS
    weight.copy_(layout.join(connections.reshape(layout.gates, *held.shape), weight))
    mask.copy_(layout.join(values.reshape(held.shape), mask))
    new_ones = moved & ~exists
    touched, fresh = (
        layout.join(flags.reshape(held.shape), weight).flatten().nonzero().flatten()
        for flags in (moved, new_ones)
    )
    if utility is not None:
        settled = staying.clone()
        settled[grown] = False
        utility.start(touched, layout.join(settled.reshape(held.shape), weight).flatten())
    return Turnover(layout.gates * len(pruned), touched, fresh)


def _grown(
    possible: Tensor, pruned: Tensor, blocks: Tensor | None, steepness: Tensor | None, generator: Generator
) -> Tensor:
    """Return where connections grow, flat positions, as many in each block as were pruned there."""
    if blocks is None:
        return _chosen(possible.nonzero().flatten(), len(pruned), steepness, generator)
    blocks = blocks.to(possible.device)
    counts = torch.bincount(blocks[pruned]).tolist()
    return torch.cat(
        [
            _chosen((possible & (blocks == number)).nonzero().flatten(), count, steepness, generator)
            for number, count in enumerate(counts)
        ]
    )


def _chosen(places: Tensor, count: int, steepness: Tensor | None, generator: Generator) -> Tensor:
    """Return some of the places, each at most once: the steepest, or at random, as ties are broken."""
    shuffled = places[torch.randperm(len(places), generator=generator).to(places.device)]
    if steepness is not None:
        shuffled = shuffled[steepness[shuffled].argsort(descending=True, stable=True)]
    return shuffled[:count]
