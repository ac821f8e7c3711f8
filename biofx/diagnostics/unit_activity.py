"""What the activity of a layer's units says of its plasticity: units that are silent, and ranks.

Sources: Sokar, Agarwal, Castro, Evci, "The dormant neuron phenomenon in deep reinforcement learning", ICML
2023, arXiv 2302.12902, definition 3.1 (dormant units); Roy, Vetterli, "The effective rank: a measure of
effective dimensionality", EUSIPCO 2007 (effective rank); Rudelson, Vershynin, "Sampling from large matrices",
Journal of the ACM 54 (2007), doi 10.1145/1255443.1255449 (stable rank).

Let H be the activity of the units, one row for each sample, that is, for each input of a batch and each
position (of an image, of a sequence), and σ its singular values.

* A unit j is dormant if mean|h_j| ≤ τ · mean over the units of mean|h|, and dead if it is 0 in every sample.
* The effective rank is exp(-Σ p log p), p = σ / Σσ.
* The stable rank is Σσ² / max σ².

Deviations: the activity is not centred. The ranks are those of some of the samples, where there are many.
Singular values come from the eigenvalues of the smaller one of H Hᵀ and Hᵀ H, in double precision, where
those below 1e-7 of the largest cannot be told from 0: they count as 0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_SEED = 20070903


@dataclass(frozen=True)
class UnitActivity:
    """The activity of a layer's units in the forwards of one step, behind their nonlinearity if any."""

    units: int
    """Units of the layer, a count; channels, where it is a convolution."""
    samples: int
    """Samples of each unit, a count: inputs times positions, in all forwards of the step."""
    mean_magnitude: float
    """Mean of abs(activity) over units and samples, in units of activity."""
    dormant: int
    """Units of a mean abs(activity) of at most the monitor's ``dormancy`` times the layer's, a count."""
    dead: int
    """Units that are 0 in every sample, a count; they are dormant too."""
    rank_samples: int
    """Samples of which the ranks are taken, a count; no rank is larger."""
    effective_rank: float
    """exp of the entropy of the normalised singular values, in [1, units]; 0 where all is 0, NaN where
    something is not finite."""
    stable_rank: float
    """Squared Frobenius norm over squared spectral norm, in [1, units]; likewise."""

    @property
    def dormant_fraction(self) -> float:
        """Fraction of the units that are dormant, in [0, 1]."""
        return self.dormant / self.units

    @property
    def dead_fraction(self) -> float:
        """Fraction of the units that are dead, in [0, 1]."""
        return self.dead / self.units


@dataclass
class SeenActivity:
    """What is kept of the activity of a layer's units while the forwards of a step run.

    Args:
        most: samples that are kept for the ranks, a count: of the first forward, and where it has fewer, of
            those that follow.
    """

    most: int
    total: Tensor | None = None
    """Sum of abs(activity) of each unit."""
    samples: int = 0
    rows: list[Tensor] = field(default_factory=list)
    """Samples, each ``(some, units)``."""
    held: int = 0

    @torch.no_grad()
    def add(self, values: Tensor, channel_axis: int) -> None:
        """Take note of the activity in a forward; what has other units than before is left out.

        Args:
            values: floating-point or complex, any shape with the units along ``channel_axis``.
            channel_axis: counted from the end.
        """
        values = values.detach()
        axes = [axis for axis in range(-values.dim(), 0) if axis != channel_axis]
        magnitude = values.abs()
        magnitude = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))
        total = magnitude.sum(axes) if axes else magnitude
        if self.total is None:
            self.total = total
        elif self.total.shape != total.shape or self.total.device != total.device:
            return
        else:
            self.total += total
        samples = values.numel() // max(1, len(total))
        self.samples += samples
        if (count := min(samples, self.most - self.held)) > 0:
            self.rows.append(_some_rows(values.movedim(channel_axis, -1), samples, count))
            self.held += count

    def measure(self, dormancy: float) -> UnitActivity | None:
        """Return what the activity says, None if none has been seen.

        Args:
            dormancy: τ, dimensionless.
        """
        if self.total is None or not self.samples or not len(self.total):
            return None
        mean = self.total.double().cpu() / self.samples
        effective, stable = ranks(torch.cat(self.rows)) if self.rows else (math.nan, math.nan)
        return UnitActivity(
            units=len(mean),
            samples=self.samples,
            mean_magnitude=mean.mean().item(),
            dormant=int((mean <= dormancy * mean.mean()).sum()),
            dead=int((mean == 0).sum()),
            rank_samples=self.held,
            effective_rank=effective,
            stable_rank=stable,
        )


@torch.no_grad()
def ranks(activity: Tensor) -> tuple[float, float]:
    """Return the effective and the stable rank of ``(samples, units)``, as the module defines them.

    Both are 0 where all is 0, and NaN where something is not finite or there is nothing.

    >>> [round(rank, 9) for rank in ranks(torch.eye(3))]
    [3.0, 3.0]
    """
    wide = torch.promote_types(activity.dtype, torch.float64)
    activity = (activity.cpu() if activity.device.type == "mps" else activity).to(wide)
    adjoint = activity.mH
    product = activity @ adjoint if len(activity) < len(adjoint) else adjoint @ activity
    product = product.cpu()
    if not product.numel() or not bool(product.isfinite().all()):
        return math.nan, math.nan
    squares = torch.linalg.eigvalsh(product).flip(0)
    largest = squares[0].item()
    if largest <= 0:
        return 0.0, 0.0
    real = squares[squares > max(activity.shape) * torch.finfo(torch.float64).eps * largest]
    shares = real.sqrt()
    shares = shares / shares.sum()
    effective = torch.special.entr(shares).sum().exp().item()
    return effective, (real.sum() / largest).item()


def _some_rows(values: Tensor, samples: int, count: int) -> Tensor:
    """Return ``count`` of the samples of ``(*, units)``, ``(count, units)``, copied."""
    units = values.shape[-1]
    if count == samples:
        return values.reshape(samples, units).clone()
    chosen = _places(samples, count).to(values.device)
    return values[torch.unravel_index(chosen, values.shape[:-1])]


@functools.lru_cache(maxsize=256)
def _places(samples: int, count: int) -> Tensor:
    """Return which samples are taken, always the same: at random, for steps would meet the same positions."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randperm(samples, generator=generator)[:count].sort().values
