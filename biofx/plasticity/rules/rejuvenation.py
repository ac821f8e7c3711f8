"""Rejuvenation: weak synapses vanish and new ones grow in their place (structural plasticity).

Source: Hofmann, Becker, Tetzlaff, Mäder, Nature Communications 16 (2025),
doi 10.1038/s41467-025-60078-9; spine turnover falls with spine size (Holtmaat, Svoboda, "Experience-dependent
structural synaptic plasticity in the mammalian brain", Nature Reviews Neuroscience 10, 2009).

Deviations: replaced weights alone change, and no weight is clamped; a weight that is not finite is an
error, not something to repair; a new weight's sign is random unless its unit has one.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from biofx.errors import NonFiniteWeightError, OptionError

_LEVELS = 256


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
        turnover: a fraction in (0, 1).

    Raises:
        OptionError: it lies outside.

    >>> round(protection_for(expected_turnover(8.0)), 6)
    8.0
    """
    if not 0 < turnover < 1:
        raise OptionError(f"turnover: expected a fraction in (0, 1), found {turnover!r}")
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
    magnitude = weight.detach().abs()
    spread = weight.std(correction=0)
    if spread == 0:
        return torch.empty(0, dtype=torch.int64, device=weight.device)
    replaced = _weaker_than_an_exponential(magnitude.flatten(), (spread / protection).item(), generator)
    count = len(replaced)
    if not count:
        return replaced
    new = _log_normal_like(magnitude.flatten(), replaced, generator).to(weight)
    signs = torch.randint(0, 2, (count,), generator=generator).mul_(2).sub_(1).to(weight)
    if sign is not None:
        fixed = sign.to(weight).expand(weight.shape).flatten()[replaced]
        signs = torch.where(fixed != 0, fixed, signs)
    weight.view(-1)[replaced] = new * signs
    return replaced


def check_finite(weight: Tensor, name: str) -> None:
    """Check that every weight is a number.

    Raises:
        NonFiniteWeightError: some are not; the message names the weight and counts them.
    """
    if not math.isfinite(weight.detach().sum().item()):
        wrong = int((~weight.isfinite()).sum())
        if wrong:
            raise NonFiniteWeightError(
                f"{name}: expected finite weights to rejuvenate, found {wrong} that are NaN or infinite; "
                "lower the learning rate or clip the gradient, and start from a sound checkpoint"
            )


def _weaker_than_an_exponential(magnitude: Tensor, scale: float, generator: Generator) -> Tensor:
    """Return where an exponential variable of mean ``scale`` exceeds the magnitude: P = exp(-|w| / scale).

    One random byte k says that the variable, -scale ln(u), has u in [k/256, (k+1)/256). That settles all but
    one in 256 of the comparisons; these take a full draw of u within its interval.
    """
    count = magnitude.numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    byte = words.view(torch.uint8)[:count].to(magnitude.device)
    bounds = -scale * torch.arange(_LEVELS + 1, dtype=torch.float64).div(_LEVELS).log()
    surely_below = bounds[1:].to(magnitude)[byte.int()]
    maybe_below = bounds[:-1].to(magnitude)[byte.int()]
    open_places = ((magnitude > surely_below) & (magnitude <= maybe_below)).nonzero().flatten()
    fine = torch.rand(len(open_places), generator=generator, dtype=torch.float64).to(magnitude.device)
    drawn = -scale * ((byte[open_places] + fine) / _LEVELS).log()
    weaker = magnitude <= surely_below
    weaker[open_places] = magnitude[open_places] < drawn
    return weaker.nonzero().flatten()


def _log_normal_like(magnitude: Tensor, replaced: Tensor, generator: Generator) -> Tensor:
    """Draw magnitudes from the log-normal fitted to those that stay (to all where none stays)."""
    stays = torch.ones_like(magnitude, dtype=torch.bool)
    stays[replaced] = False
    kept = magnitude[stays & (magnitude > 0)]
    logs = (kept if len(kept) else magnitude[magnitude > 0]).double().log()
    normal = torch.randn(len(replaced), generator=generator, dtype=torch.float64).to(magnitude.device)
    return (logs.mean() + logs.std(correction=0) * normal).exp()
