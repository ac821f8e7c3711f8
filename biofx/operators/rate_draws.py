"""Learning-rate factors that are not stored, but drawn again from their seed whenever they are needed.

What is kept instead is what they are drawn from. The numbers are those that a draw which is stored would
have, to the bit.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biofx.errors import PlasticityError
from biofx.operators.distributions import (
    GRANULARITIES,
    INDEPENDENT,
    Distribution,
    draw_factors,
    for_each_truncated,
    independent_draw,
)
from biofx.operators.randomness import key_for

PURPOSE = "scale-gradients"
"""What draws of factors are for: it keeps them apart from others for the same weight."""


@dataclass(frozen=True, kw_only=True)
class RateDraw:
    """What the factors of a weight are drawn from."""

    distribution: Distribution
    """One of :data:`biofx.config.INDEPENDENT`."""
    nu: float
    """Spread of the factors around 1, dimensionless."""
    low: float
    """Lower bound of a factor, dimensionless."""
    high: float
    """Upper bound of a factor, dimensionless."""
    key: int
    """What the generator is seeded with; it depends on the user's seed and the parameter's path."""
    depth: float = 0.0
    """Place of the layer in execution order, 0 for the first and 1 for the last."""
    granularity: str = "element"
    """What shares a factor, one of :data:`biofx.config.GRANULARITIES`."""
    output_axis: int = 0
    """The axis of the weight that counts the postsynaptic units."""

    def factors(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the factors of a weight, float32, of its rank and of size 1 along axes that share one.

        Args:
            shape: of the weight.
            device: where to.
        """
        kept = {"element": range(len(shape)), "neuron": (self.output_axis,), "layer": ()}[self.granularity]
        sizes = [size if axis in kept else 1 for axis, size in enumerate(shape)]
        return draw_factors(
            self.distribution,
            torch.empty((), device=device).expand(sizes),
            nu=self.nu,
            low=self.low,
            high=self.high,
            generator=self._generator(),
            depth=self.depth,
        )

    def multiply(self, values: Tensor, *, out: Tensor) -> Tensor:
        """Write ``values`` times the factors to ``out``, which may be ``values``, and return it.

        On the CPU the factors are drawn block by block, never all at once.

        Args:
            values: of the shape of the weight.
            out: shaped like ``values``.
        """
        by_blocks = self.granularity == "element" and self.distribution is not Distribution.BASELINE
        for tensor in (values, out):
            by_blocks = by_blocks and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not by_blocks or self.nu == 0:
            factors = self.factors(values.shape, values.device)
            return torch.mul(values, factors.to(values.dtype), out=out)
        flat, written = values.view(-1), out.view(-1)

        def take(block: slice, factors: Tensor) -> None:
            torch.mul(flat[block], factors.to(flat.dtype), out=written[block])

        draw, what = independent_draw(self.distribution, self.nu, self.depth)
        for_each_truncated(draw, flat.numel(), self.low, self.high, what, self._generator(), take)
        return out

    def told(self) -> str:
        """Return it in words."""
        return f"{self.distribution.value} with nu={self.nu:g} within [{self.low:g}, {self.high:g}]"

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.key)

    def to_tensor(self, device: torch.device) -> Tensor:
        """Return all of it as int64 numbers, which no change of a model's type rounds, shape ``(8,)``.

        Files hold them: the order of the distributions and of the granularities must stay.
        """
        reals = struct.unpack("<4q", struct.pack("<4d", self.nu, self.low, self.high, self.depth))
        places = (
            *(INDEPENDENT.index(self.distribution), GRANULARITIES.index(self.granularity), self.output_axis),
        )
        return torch.tensor([self.key, *reals, *places], dtype=torch.int64, device=device)

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> RateDraw:
        """Read :meth:`to_tensor`.

        Raises:
            PlasticityError: the numbers are something else.
        """
        try:
            key, *reals, distribution, granularity, output_axis = numbers.tolist()
            nu, low, high, depth = struct.unpack("<4d", struct.pack("<4q", *reals))
            if min(distribution, granularity, output_axis, key) < 0:
                raise ValueError("negative")
            return cls(
                distribution=INDEPENDENT[distribution],
                nu=nu,
                low=low,
                high=high,
                key=key,
                depth=depth,
                granularity=GRANULARITIES[granularity],
                output_axis=output_axis,
            )
        except (ValueError, TypeError, IndexError, struct.error) as error:
            raise PlasticityError(
                f"expected what factors are drawn from, found {numbers.flatten()[:8].tolist()} ({error}); "
                "load a sound checkpoint, or transform the model anew"
            ) from error


@functools.lru_cache(maxsize=4096)
def rate_draw(
    distribution: str,
    nu: float,
    low: float,
    high: float,
    seed: int,
    path: str,
    depth: float = 0.0,
    granularity: str = "element",
    output_axis: int = 0,
) -> RateDraw:
    """Return the draw of a parameter's factors.

    Args:
        distribution: name of an independent distribution.
        nu: as :class:`RateDraw` has it, and so all that follows but ``seed`` and ``path``.
        low: likewise.
        high: likewise.
        seed: the user's.
        path: path of the parameter.
        depth: likewise.
        granularity: likewise.
        output_axis: likewise.
    """
    return RateDraw(
        distribution=Distribution(distribution),
        nu=nu,
        low=low,
        high=high,
        key=key_for(seed, path, purpose=PURPOSE),
        depth=depth,
        granularity=granularity,
        output_axis=output_axis,
    )


def told_of_place(depth: float, granularity: str, output_axis: int) -> dict[str, Any]:
    """Return the last arguments of :func:`rate_draw`, those that say nothing new left out."""
    options: dict[str, Any] = {"depth": depth} if depth else {}
    if granularity != "element":
        options["granularity"] = granularity
    if granularity == "neuron" and output_axis:
        options["output_axis"] = output_axis
    return options
