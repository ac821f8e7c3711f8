"""Rejuvenation: weak synapses vanish and new ones grow in their place (structural plasticity).

Source: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025),
doi 10.1038/s41467-025-60078-9; spine turnover falls with spine size (Holtmaat, Svoboda, "Experience-dependent
structural synaptic plasticity in the mammalian brain", Nature Reviews Neuroscience 10, 2009). Weights from
the initial distribution, or 0: Hernandez-Garcia and others, "Reinitializing weights vs units for maintaining
plasticity in neural networks", arXiv 2508.00212.

By magnitude this does not prevent loss of plasticity: dead units keep large weights, which it protects.

Deviations: only replaced weights change, and no weight is clamped; a weight that is not finite is an error
and is not repaired; a new weight's sign is random unless its unit has one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from biofx.errors import NonFiniteWeightError, OptionError, PlasticityError
from biofx.operators.sampling import LEVELS, for_each_block, mean_over, random_levels
from biofx.plasticity.initial_weights import InitialWeights
from biofx.plasticity.selection import BelowMean, LowestShare, Utility, judged

_ENOUGH = 1 << 18


def expected_turnover(protection: float) -> float:
    """Return the expected fraction of normally distributed weights that one rejuvenation replaces.

    The mean of exp(-d|z|) over a standard normal z is erfcx(d / √2).

    Args:
        protection: d, the configured ``rejuvenation_parameter_dre``, in standard deviations, > 0.

    >>> round(expected_turnover(8.0), 3)
    0.098
    """
    scaled = torch.tensor(protection / math.sqrt(2), dtype=torch.float64)
    return float(torch.special.erfcx(scaled))


def protection_for(turnover: float) -> float:
    """Return the protection d at which the expected turnover of normal weights is ``turnover``.

    Args:
        turnover: a fraction in (0, 1].

    Raises:
        OptionError: it lies outside.

    >>> round(protection_for(expected_turnover(8.0)), 6)
    8.0
    """
    if not 0 < turnover <= 1:
        raise OptionError(f"turnover: expected a fraction in (0, 1], found {turnover!r}")
    low, high = 0.0, 1.0
    while expected_turnover(high) > turnover:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_turnover(middle) > turnover else (low, middle)
    return high


@torch.no_grad()
def rejuvenate(
    weight: Tensor,
    *,
    protection: float,
    generator: Generator,
    sign: Tensor | None = None,
    initial: InitialWeights | None = None,
    utility: Utility | None = None,
    stays: Tensor | None = None,
    selection: LowestShare | BelowMean | None = None,
    name: str = "weight",
) -> Tensor:
    """Replace weak weights in place: each with probability exp(-d |w| / std(w)).

    A new magnitude is log-normal with the mean and spread of log|w| over the weights that stay; its sign is
    that of ``sign`` where one is given and not 0, else random. With ``initial``, weights are drawn from that.

    Args:
        weight: any shape, floating point; its storage stays.
        protection: d, in standard deviations of the weights, > 0.
        generator: a CPU generator, the only source of randomness.
        sign: broadcastable to ``weight``; +1, -1, or 0 for free.
        initial: what new weights are drawn from; None for magnitudes as those that stay have.
        utility: what takes the place of |w| and of std(w) in the choice; of the new weights it becomes the
            mean of the others.
        stays: where weights are never replaced, bool, broadcastable to ``weight``; None for nowhere.
        selection: how weights are chosen; None for each with its chance.
        name: what an error calls the weight.

    Returns:
        The flat positions of the replaced weights, int64.

    Raises:
        NonFiniteWeightError: a weight is NaN or infinite; nothing has been changed.
    """
    check_finite(weight, name)
    flat, moments = weight.detach().reshape(-1), None
    by_weight = utility is None and stays is None
    compared = flat if by_weight else judged(weight, utility, stays).reshape(-1)
    if selection is not None:
        replaced = selection.choose(compared, generator)
    else:
        scale = spread_of(flat) / protection if utility is None else utility.scale(compared, protection)
        if scale == 0:
            return torch.empty(0, dtype=torch.int64, device=weight.device)
        replaced, moments = choose_weak(compared, scale, generator)
    if not len(replaced):
        return replaced
    if moments is None or not by_weight:
        staying = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
        staying[replaced] = False
        if initial is None:
            moments = moments_of(flat, staying)
        if utility is not None:
            utility.start(replaced, staying)
    fixed = None if sign is None else sign.expand(weight.shape).take(replaced)
    new = new_weights(len(replaced), moments, fixed, generator, initial).to(weight)
    if weight.is_contiguous():  # many times faster
        weight.view(-1).scatter_(0, replaced, new)
    else:
        weight.put_(replaced, new)
    return replaced


def new_weights(
    count: int,
    moments: Tensor | None,
    sign: Tensor | None,
    generator: Generator,
    initial: InitialWeights | None = None,
) -> Tensor:
    """Sample the weights of new synapses, log-normal in magnitude, ``(count,)``, in units of weight.

    Args:
        count: how many.
        moments: of the weights that stay, as :func:`log_moments` returns them; not needed with ``initial``.
        sign: +1, -1, or 0 for a random one, ``(count,)``; None for random ones.
        generator: a CPU generator, the only source of randomness.
        initial: what they are sampled from instead; where a sign is given, their magnitude.
    """
    if initial is not None:
        drawn = initial.sample(count, generator)
        if sign is None:
            return drawn
        fixed = sign.to(drawn.dtype)
        drawn = drawn.to(fixed.device)
        return torch.where(fixed == 0, drawn, drawn.abs() * fixed)
    number, total, squares = (0.0, 0.0, 0.0) if moments is None else moments.tolist()
    mean = total / max(1, number)
    deviation = math.sqrt(max(0.0, squares / max(1, number) - mean**2))
    new = torch.randn(count, generator=generator).mul_(deviation).add_(mean).exp_()
    signs = torch.randint(0, 2, (count,), generator=generator).mul_(2).sub_(1).to(new)
    if sign is not None:
        fixed = sign.to(new)
        new, signs = new.to(fixed.device), fixed.add(signs.to(fixed.device).mul_(1 - fixed.abs()))
    return new.mul_(signs)


def check_finite(weight: Tensor, name: str) -> None:
    """Check that every weight is a number.

    Raises:
        NonFiniteWeightError: some are not; the message names the weight and counts them.
        PlasticityError: they are complex.
    """
    if weight.is_complex():
        raise PlasticityError(f"{name}: expected real weights to rejuvenate, found {weight.dtype}")
    if not math.isfinite(weight.detach().sum().item()):
        wrong = int((~weight.isfinite()).sum())
        if wrong:
            raise NonFiniteWeightError(
                f"{name}: expected finite weights to rejuvenate, found {wrong} that are NaN or infinite; "
                "lower the learning rate or clip the gradient, and start from a sound checkpoint"
            )


def log_moments(magnitude: Tensor) -> Tensor:
    """Return count, sum and sum of squares of log|w|, without weights of 0; float64 on the CPU."""
    logs = magnitude[magnitude > 0].log().double()
    return torch.tensor([len(logs), logs.sum().item(), logs.square().sum().item()], dtype=torch.float64)


def moments_of(weights: Tensor, staying: Tensor) -> Tensor:
    """Return the :func:`log_moments` of the weights that stay, of all if none of those is other than 0.

    Args:
        weights: any shape.
        staying: along the last axes of ``weights``, bool.
    """
    moments = log_moments(weights[..., staying].abs().float().flatten())
    return moments if moments[0] else log_moments(weights.abs().float().flatten())


def spread_of(weight: Tensor) -> float:
    """Return the standard deviation of all weights."""
    mean = mean_over(len(weight), lambda block: weight[block].sum(dtype=torch.float32))

    def squares(block: slice) -> Tensor:
        apart = weight[block].float() - mean
        return apart.dot(apart)

    return math.sqrt(mean_over(len(weight), squares))


def choose_weak(weight: Tensor, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Choose each weight with P = exp(-|w| / scale); return flat positions, and moments of those that stay.

    A weight is chosen if its level k, sampled from 0 to 65535, and an offset in [0, 1) that its block samples
    add up to less than 65536 P: over both that is exactly P. Of a large weight, a part of each block suffices
    for the moments of those that stay; if none stays, all weights count.
    """
    places, kept, everything = zip(
        *weak_in_blocks(weight, scale, generator, total=weight.numel()), strict=True
    )
    moments = sum(kept, torch.zeros(3, dtype=torch.float64))
    if not moments[0]:
        moments = sum(everything, moments)
    return torch.cat(places), moments


def weak_in_blocks(
    weight: Any, scale: float, generator: Generator, *, total: int, within: slice | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return for each block what :func:`choose_weak` chooses, moments of those that stay, and of all.

    The latter are of all if none stays, else of none.

    Args:
        weight: flat; or anything that gives the block at a slice.
        scale: as there.
        generator: likewise.
        total: elements of the weight, a count.
        within: flat positions of the blocks that are asked for; None for all.
    """
    share = max(1, total // _ENOUGH)

    def choose(block: slice, own: Generator) -> tuple[Tensor, Tensor, Tensor]:
        magnitude = weight[block].abs().float()
        level = random_levels(len(magnitude), own).to(magnitude.device).float()
        offset = torch.rand((), generator=own).item()
        # a power of e costs four times what one of 2 does, and a comparison more than twice a clamp
        margin = magnitude.mul(-1 / (scale * math.log(2))).exp2_().mul_(LEVELS).sub_(level).sub_(offset)
        chosen = margin.clamp_(min=0).bool()
        places = chosen.nonzero().flatten()
        part = magnitude[: -(-len(magnitude) // share)]
        kept = log_moments(part[~chosen[: len(part)]])
        everything = log_moments(part if len(places) == len(magnitude) else part[:0])
        return places.add_(block.start), kept, everything

    return for_each_block(total, choose, generator, within=within)
