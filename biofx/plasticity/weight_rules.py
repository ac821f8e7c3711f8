"""Rules that change weights: rejuvenation, synaptic scaling, and balance to start with.

Rejuvenation: weak synapses vanish and new ones grow in their place (structural plasticity). Source: Hofmann,
Becker, Tetzlaff, Mäder, Nature Communications 16 (2025), doi 10.1038/s41467-025-60078-9; spine turnover falls
with spine size (Holtmaat, Svoboda, "Experience-dependent structural synaptic plasticity in the mammalian
brain", Nature Reviews Neuroscience 10, 2009). Deviations: only replaced weights change, and no weight is
clamped; a weight that is not finite is an error and is not repaired; a new weight's sign is random unless its
unit has one.

Synaptic scaling: a neuron multiplies all its inputs so that their total, or its activity, stays put. Source:
Turrigiano, Leslie, Desai, Rutherford, Nelson, "Activity-dependent scaling of quantal amplitude in neocortical
neurons", Nature 391 (1998); van Rossum, Bi, Turrigiano, "Stable Hebbian learning from spike timing-dependent
plasticity", Journal of Neuroscience 20 (2000), the multiplicative form.

Balance: initial weights that keep a deep network alive although every unit has one sign. If each postsynaptic
unit takes more excitation than inhibition, or the reverse, all units of a layer follow one common drive, and
after a few layers they are all alike. So excitation and inhibition are balanced at each unit, and connections
are sparse, which makes what units have in common small against what is their own. Source: van Vreeswijk,
Sompolinsky, "Chaos in neuronal networks with balanced excitatory and inhibitory activity", Science 274
(1996); the loss of rank under Dale's principle, Li et al., "Learning better with Dale's law: a spectral
perspective", NeurIPS 2023; variance of rectified units, He et al., ICCV 2015.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from biofx.errors import NonFiniteWeightError, OptionError, PlasticityError
from biofx.operators.sampling import LEVELS, for_each_block, mean_over, random_levels
from biofx.plasticity.weight_layout import (
    broadcast_units,
    rows_of_units,
    sum_units,
    weight_of_rows,
    write_flat,
)

_ENOUGH = 1 << 18
DENSITY = 0.1
"""Fraction of the synapses that a balanced unit starts with, dimensionless."""
FEWEST = 16
"""Synapses that a balanced unit starts with at least, where it has that many, a count."""
_RECTIFIED = 1 / (1 - 1 / math.pi)
"""E[a²] / Var[a] of a rectified normal variable: balance removes its mean, and this makes up for it."""


# rejuvenation


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
    name: str = "weight",
) -> Tensor:
    """Replace weak weights in place: each with probability exp(-d |w| / std(w)).

    A new magnitude is log-normal with the mean and spread of log|w| over the weights that stay; its sign is
    that of ``sign`` where one is given and not 0, else random.

    Args:
        weight: any shape, floating point; its storage stays.
        protection: d, in standard deviations of the weights, > 0.
        generator: a CPU generator, the only source of randomness.
        sign: broadcastable to ``weight``; +1, -1, or 0 for free.
        name: what an error calls the weight.

    Returns:
        The flat positions of the replaced weights, int64.

    Raises:
        NonFiniteWeightError: a weight is NaN or infinite; nothing has been changed.
    """
    check_finite(weight, name)
    spread = _spread(weight.detach().reshape(-1))
    if spread == 0:
        return torch.empty(0, dtype=torch.int64, device=weight.device)
    replaced, moments = _choose_weak(weight.detach().reshape(-1), spread / protection, generator)
    if not len(replaced):
        return replaced
    mean, deviation = moments.mean_and_deviation()
    new = torch.randn(len(replaced), generator=generator).mul_(deviation).add_(mean).exp_().to(weight)
    signs = torch.randint(0, 2, (len(replaced),), generator=generator).mul_(2).sub_(1).to(weight)
    if sign is not None:
        fixed = sign.expand(weight.shape).take(replaced).to(weight)
        signs = fixed.add_(signs.mul_(1 - fixed.abs()))
    write_flat(weight, replaced, new.mul_(signs))
    return replaced


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


@dataclass(frozen=True)
class _LogMoments:
    """Count, sum and sum of squares of log|w|."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, magnitude: Tensor) -> _LogMoments:
        logs = magnitude[magnitude > 0].log().double()
        return cls(len(logs), logs.sum().item(), logs.square().sum().item())

    def __add__(self, other: _LogMoments) -> _LogMoments:
        return _LogMoments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def mean_and_deviation(self) -> tuple[float, float]:
        count = max(1, self.count)
        mean = self.total / count
        return mean, math.sqrt(max(0.0, self.squares / count - mean**2))


def _spread(weight: Tensor) -> float:
    """Return the standard deviation of all weights."""
    mean = mean_over(len(weight), lambda block: weight[block].sum(dtype=torch.float32))

    def squares(block: slice) -> Tensor:
        apart = weight[block].float() - mean
        return apart.dot(apart)

    return math.sqrt(mean_over(len(weight), squares))


def _choose_weak(weight: Tensor, scale: float, generator: Generator) -> tuple[Tensor, _LogMoments]:
    """Choose each weight with P = exp(-|w| / scale); return the places, and moments of those that stay.

    A weight is chosen if its level k, drawn from 0 to 65535, and an offset in [0, 1) that its block draws
    add up to less than 65536 P: over both draws that is exactly P. Of a large weight, a part of each block
    is enough to know how the ones that stay are distributed; where none stays, all of them count.
    """
    share = max(1, weight.numel() // _ENOUGH)

    def choose(block: slice, own: Generator) -> tuple[Tensor, _LogMoments, _LogMoments]:
        magnitude = weight[block].abs().float()
        level = random_levels(len(magnitude), own).to(magnitude.device).float()
        offset = torch.rand((), generator=own).item()
        # a power of e costs four times what one of 2 does, and a comparison more than twice a clamp
        margin = magnitude.mul(-1 / (scale * math.log(2))).exp2_().mul_(LEVELS).sub_(level).sub_(offset)
        chosen = margin.clamp_(min=0).bool()
        places = chosen.nonzero().flatten()
        part = magnitude[: -(-len(magnitude) // share)]
        kept = _LogMoments.of(part[~chosen[: len(part)]])
        everything = _LogMoments() if len(places) < len(magnitude) else _LogMoments.of(part)
        return places.add_(block.start), kept, everything

    found = for_each_block(weight.numel(), choose, generator)
    places = torch.cat([part for part, _, _ in found])
    kept = sum((moments for _, moments, _ in found), _LogMoments())
    return places, kept if kept.count else sum((moments for _, _, moments in found), _LogMoments())


# synaptic scaling


@torch.no_grad()
def synaptic_scaling(
    weight: Tensor, target: Tensor, *, rate: float, output_axis: int = 0, groups: int = 1
) -> Tensor:
    """Move the total input strength of each neuron towards its target, in place.

    w_ji ← w_ji · (1 + ``rate`` · (T_j / Σ_i |w_ji| - 1)): ratios between a neuron's synapses stay.

    Args:
        weight: ``(out, in, *)``.
        target: T, total strength per neuron, ``(out,)``, in units of weight.
        rate: how much of the way to go, dimensionless, in (0, 1].
        output_axis: the axis of ``weight`` that counts the neurons.
        groups: groups of a convolution.

    Returns:
        The multiplier of each neuron, ``(out,)``, dimensionless; 1 for a neuron without input.
    """
    total = input_strength(weight, output_axis=output_axis, groups=groups)
    multiplier = torch.where(total > 0, 1 + rate * (target / total - 1), torch.ones_like(total))
    weight.mul_(broadcast_units(multiplier, weight, output_axis=output_axis, groups=groups).to(weight))
    return multiplier


def input_strength(weight: Tensor, *, output_axis: int = 0, groups: int = 1) -> Tensor:
    """Return Σ_i |w_ji| for each neuron j, shape ``(out,)``, in units of weight."""
    return sum_units(weight.detach().abs(), output_axis=output_axis, groups=groups)


# balance


@torch.no_grad()
def balanced(weight: Tensor, signs: Tensor, generator: Generator, *, rectified: bool = True) -> Tensor:
    """Return weights of the given signs, sparse, and in balance for each row.

    Magnitudes are those of ``weight``, scaled so that excitation and inhibition of a row add up to 0 and that
    its postsynaptic unit varies as much as it did. A row whose units are all of one sign cannot be balanced
    and keeps all its magnitudes.

    Args:
        weight: ``(rows, synapses)``.
        signs: +1, -1, or 0 for synapses that are free and stay as they are; shaped like ``weight``.
        generator: a CPU generator, the only source of randomness.
        rectified: whether the presynaptic activity is that of rectified units, so not negative.
    """
    magnitude, constrained = weight.abs(), signs != 0
    density = min(1.0, max(DENSITY, FEWEST / max(1, int(constrained.sum(1).max()))))
    chosen = (torch.rand(weight.shape, generator=generator) < density).to(weight.device)
    sparse = _balanced(magnitude * chosen, signs)
    dense = _balanced(magnitude, signs)
    mirrored = magnitude * signs
    made = torch.where(_balances(sparse), sparse, torch.where(_balances(dense), dense, mirrored))
    before = (weight * constrained).square().sum(1, keepdim=True) * (_RECTIFIED if rectified else 1.0)
    after = made.square().sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    scaled = torch.where(_balances(made), made * (before / after).sqrt(), made)
    return torch.where(constrained, scaled, weight)


def balanced_weight(
    weight: Tensor, signs: Tensor, generator: Generator, *, output_axis: int, groups: int, rectified: bool
) -> Tensor:
    """Do the same with a layer's weight.

    Args:
        weight: ``(out, in / groups, *)``, or ``(in, out / groups, *)`` where ``output_axis`` is 1.
        signs: broadcastable to it; +1, -1, or 0 for synapses that are free.
        generator: a CPU generator, the only source of randomness.
        output_axis: the axis of ``weight`` that counts the postsynaptic units.
        groups: groups of a convolution, a count.
        rectified: as in :func:`balanced`.
    """
    rows = rows_of_units(weight, output_axis=output_axis, groups=groups)
    of_rows = rows_of_units(signs.expand_as(weight), output_axis=output_axis, groups=groups)
    made = balanced(rows, of_rows, generator, rectified=rectified)
    return weight_of_rows(made, weight, output_axis=output_axis, groups=groups)


def _balanced(magnitude: Tensor, signs: Tensor) -> Tensor:
    """Return excitation and inhibition of each row scaled to a sum of 1 each; 0 where one is missing."""
    excitation, inhibition = magnitude * (signs > 0), magnitude * (signs < 0)
    totals = excitation.sum(1, keepdim=True), inhibition.sum(1, keepdim=True)
    both = (totals[0] > 0) & (totals[1] > 0)
    made = excitation / totals[0].clamp(min=1e-30) - inhibition / totals[1].clamp(min=1e-30)
    return torch.where(both, made, 0.0)


def _balances(rows: Tensor) -> Tensor:
    """Return whether each row has synapses of both signs, ``(rows, 1)``."""
    return (rows > 0).any(1, keepdim=True) & (rows < 0).any(1, keepdim=True)
