"""Learning-rate factors: one dimensionless number per synapse, scattered around 1, and how they are sampled.

Source: Hofmann, Becker, Tetzlaff, Mäder, "Concept transfer of synaptic diversity from biological to
artificial neural networks", Nature Communications 16 (2025), doi 10.1038/s41467-025-60078-9, in the
parametrisation of the user guide. ν is the spread. Log-uniform factors: Alrao, Blier, Wolinski, Ollivier,
"Learning with random learning rates", 2018, arXiv 1810.01322, where each unit draws one. They lie between
bounds that are decades apart, and have no other parameter: ν does not shape them.

Deviations: bounds truncate (a number outside is sampled again) instead of clamping, so that no probability
piles up on a bound; the gamma distribution has mean 1 and standard deviation ν. Log-uniform rates are drawn
here as factors on the optimizer's rate, as in the source without being divided by their mean, which is
(high - low) / ln(high / low): 1.086 between 0.001 and 10.

A new distribution is a member of :class:`Distribution`, an entry of ``_SAMPLERS``, and one of
:data:`CHANGING` or, at its end, :data:`INDEPENDENT`.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor

from biofx.errors import OptionError, PlasticityError
from biofx.operators.dispatch import is_on_host
from biofx.operators.sampling import for_each_block, handed_over, key_for
from biofx.torch_private import standard_gamma


class Distribution(str, Enum):
    """How the learning-rate factors of a layer's synapses are distributed."""

    BASELINE = "baseline"
    UNIFORM = "uniform"
    NORMAL = "normal"
    LOGNORMAL = "lognormal"
    GAMMA = "gamma"
    BETA = "beta"
    LAYER_ADAPTIVE = "layer_adaptive"
    WEIGHT_ADAPTIVE = "weight_adaptive"
    TEMPORAL = "temporal"
    ACTIVITY = "activity"
    LOG_UNIFORM = "log_uniform"


CHANGING = (Distribution.TEMPORAL, Distribution.WEIGHT_ADAPTIVE, Distribution.ACTIVITY)
"""The distributions whose factors can go on changing during training."""
FOLLOWING = (Distribution.WEIGHT_ADAPTIVE, Distribution.ACTIVITY)
"""The distributions whose factors are 1 + ν · c · u, with a random part u and a part c that can change."""
INDEPENDENT = (
    *(Distribution.BASELINE, Distribution.UNIFORM, Distribution.NORMAL, Distribution.LOGNORMAL),
    *(Distribution.GAMMA, Distribution.BETA, Distribution.LAYER_ADAPTIVE, Distribution.LOG_UNIFORM),
)
"""The distributions that depend neither on weights nor on time, so that factors can be sampled again at any
time; files refer to them by their place."""
GRANULARITIES = ("element", "neuron", "layer")
"""What shares a factor: nothing, the synapses onto a neuron, or all of a layer; files refer to the place."""

_PURPOSE = "scale-gradients"
_MOST_ROUNDS = 1000
_LARGEST = 1.5
_ROUNDING = 1e-5
_Places: TypeAlias = slice | Tensor
"""Flat positions: a block, or single ones."""
_Sampler: TypeAlias = Callable[[_Places, int, Generator], Tensor]
"""Samples ``count`` values for the given positions."""


def _uniform(count: int, nu: float, generator: Generator) -> Tensor:
    """U(1 - ν, 1 + ν)."""
    return _symmetric(count, generator).mul_(nu).add_(1)


def _normal(count: int, nu: float, generator: Generator) -> Tensor:
    """N(1, ν²)."""
    return _standard_normal(count, generator).mul_(nu).add_(1)


def _lognormal(count: int, nu: float, generator: Generator) -> Tensor:
    """exp N(-ν²/2, ν²), whose mean is 1."""
    return _standard_normal(count, generator).mul_(nu).sub_(nu**2 / 2).exp_()


def _gamma(count: int, nu: float, generator: Generator) -> Tensor:
    """Gamma(shape 1/ν², rate 1/ν²), whose mean is 1 and whose standard deviation is ν."""
    return _standard_gamma(count, nu**-2, generator) * nu**2


def _beta(count: int, nu: float, generator: Generator) -> Tensor:
    """1 + ν(2B - 1) with B ~ Beta(1/ν, 1/ν), inside [1 - ν, 1 + ν]."""
    first, second = _standard_gamma(count, 1 / nu, generator), _standard_gamma(count, 1 / nu, generator)
    return 1 + nu * (first - second) / (first + second)


def _log_uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    """exp U(ln low, ln high)."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    logs = uniform.mul_(math.log(high) - math.log(low)).add_(math.log(low))
    return logs.exp_().float().clamp_(low, high)  # which rounding alone can leave


def _symmetric(count: int, generator: Generator) -> Tensor:
    """U(-1, 1)."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
    return uniform.mul_(2).sub_(1)


def _standard_normal(count: int, generator: Generator) -> Tensor:
    return torch.randn(count, generator=generator, dtype=torch.float32, device="cpu")


def _standard_gamma(count: int, shape: float, generator: Generator) -> Tensor:
    if not math.isfinite(shape):
        raise OptionError(f"expected a spread nu that a gamma distribution can have, found shape {shape}")
    shapes = torch.full((count,), shape, dtype=torch.float32, device="cpu")
    return standard_gamma(shapes, generator=generator)


_SAMPLERS: dict[Distribution, Callable[[int, float, Generator], Tensor]] = {
    Distribution.UNIFORM: _uniform,
    Distribution.LAYER_ADAPTIVE: _uniform,
    Distribution.NORMAL: _normal,
    Distribution.TEMPORAL: _normal,
    Distribution.LOGNORMAL: _lognormal,
    Distribution.GAMMA: _gamma,
    Distribution.BETA: _beta,
}


@dataclass(frozen=True, kw_only=True)
class RateSampling:
    """What the factors of a weight are sampled from."""

    distribution: Distribution
    nu: float
    """Spread of the factors around 1, dimensionless; of log-uniform ones it matters only whether it is 0,
    which makes every factor 1."""
    low: float
    """Lower bound of a factor, dimensionless; > 0 and finite, as is the upper one, for log-uniform ones."""
    high: float
    """Upper bound of a factor, dimensionless."""
    key: int
    """What the generator is seeded with; it depends on the user's seed and the parameter's path."""
    depth: float = 0.0
    """Place of the layer in execution order, 0 for the first and 1 for the last; ``LAYER_ADAPTIVE`` alone
    uses it, with a spread of ``nu * (1 - depth / 2)``."""
    granularity: str = "element"
    """What shares a factor, one of :data:`GRANULARITIES`."""
    output_axis: int = 0
    """The axis of the weight that counts the postsynaptic units."""

    def sample(self, weight: Tensor, exists: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sample the factors that training starts with.

        Args:
            weight: ``(out, in, *)``, or ``(in, out, *)`` where ``output_axis`` is 1; its values matter to
                ``WEIGHT_ADAPTIVE`` alone.
            exists: where connections exist, bool, shaped like the weight, which is 0 elsewhere; None for
                everywhere.

        Returns:
            The factors, float32, of the weight's rank and of size 1 along axes that share one; and for
            distributions that follow weights or activity their random part u, else None.

        Raises:
            OptionError: next to nothing of the distribution lies in the bounds.
        """
        if self.distribution not in FOLLOWING or not self.nu:
            return self.factors(weight.shape, weight.device), None
        magnitude = pooled_magnitude(weight, self.granularity, self.output_axis)
        generator = self._generator()
        noise = torch.empty(magnitude.numel(), dtype=torch.float32, device="cpu")
        for_each_block(
            *(len(noise), lambda block, own: noise[block].copy_(_symmetric(block.stop - block.start, own))),
            generator,
        )
        noise = noise.reshape(magnitude.shape).to(magnitude.device)
        adaptive = self.distribution is Distribution.WEIGHT_ADAPTIVE
        smallness = relative_smallness(magnitude, exists) if adaptive else 1.0
        factors = following_factors(
            noise, smallness, nu=self.nu, low=self.low, high=self.high, generator=generator
        )
        return factors, noise

    def factors(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Sample the factors of a weight whose values do not matter, as :meth:`sample` does.

        Args:
            shape: of the weight.
            device: where to.
        """
        kept = {"element": range(len(shape)), "neuron": (self.output_axis,), "layer": ()}[self.granularity]
        sizes = [size if axis in kept else 1 for axis, size in enumerate(shape)]
        if self._is_one:
            return torch.ones(sizes, dtype=torch.float32, device=device)
        factors = torch.empty(math.prod(sizes), dtype=torch.float32, device="cpu")
        self._for_each_block(len(factors), lambda block, part: factors[block].copy_(part))
        return handed_over(factors.reshape(sizes), device)

    def factors_of_part(
        self, shape: torch.Size, sizes: tuple[int, ...], starts: tuple[int, ...], device: torch.device
    ) -> Tensor:
        """Return what :meth:`factors` samples for a part of a weight, without the others in memory.

        Args:
            shape: of the weight.
            sizes: of the part.
            starts: where it begins along each axis.
            device: where to.
        """
        if self.granularity != "element" or self._is_one:
            factors = self.factors(shape, device)
            for axis, (size, start) in enumerate(zip(sizes, starts, strict=True)):
                if factors.shape[axis] != 1:
                    factors = factors.narrow(axis, min(start, shape[axis] - size), size)
            return factors
        made = torch.empty(sizes, dtype=torch.float32, device="cpu")

        def take(block: slice, factors: Tensor) -> None:
            flat = torch.arange(block.start, block.stop)
            inside, places = torch.ones(len(flat), dtype=torch.bool), list[Tensor]()
            for axis in reversed(range(len(shape))):
                place = flat % shape[axis] - starts[axis]
                flat = flat // shape[axis]
                inside &= (place >= 0) & (place < sizes[axis])
                places.insert(0, place)
            made[tuple(place[inside] for place in places)] = factors[inside]

        self._for_each_block(math.prod(shape), take)
        return made.to(device)

    def multiply(self, values: Tensor, *, out: Tensor) -> Tensor:
        """Write ``values`` times the factors to ``out``, which may be ``values``, and return it.

        On the CPU the factors are sampled block by block, never all at once.

        Args:
            values: of the shape of the weight.
            out: shaped like ``values``.
        """
        by_blocks = self.granularity == "element" and not self._is_one
        for tensor in (values, out):
            by_blocks = by_blocks and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not by_blocks:
            factors = self.factors(values.shape, values.device)
            return torch.mul(values, factors.to(values.dtype), out=out)
        flat, written = values.view(-1), out.view(-1)

        def take(block: slice, factors: Tensor) -> None:
            torch.mul(flat[block], factors.to(flat.dtype), out=written[block])

        self._for_each_block(flat.numel(), take)
        return out

    @property
    def _is_one(self) -> bool:
        """Whether all factors are 1."""
        return self.nu == 0 or self.distribution is Distribution.BASELINE

    def _for_each_block(self, count: int, take: Callable[[slice, Tensor], object]) -> None:
        """Hand the factors of ``count`` synapses over, block by block."""
        adaptive = self.distribution is Distribution.LAYER_ADAPTIVE
        spread = self.nu * (1 - self.depth / 2) if adaptive else self.nu
        _for_each_truncated(
            lambda _, count, own: self._sampled(count, spread, own),
            *(count, self.low, self.high, f"{self.distribution.value} with nu={spread:g}", self._generator()),
            take,
        )

    def _sampled(self, count: int, spread: float, generator: Generator) -> Tensor:
        if self.distribution is Distribution.LOG_UNIFORM:
            return _log_uniform(count, self.low, self.high, generator)
        return _SAMPLERS[self.distribution](count, spread, generator)

    def _generator(self) -> Generator:
        return Generator().manual_seed(self.key)

    def describe(self) -> str:
        """Return it in words."""
        if self.distribution is Distribution.LOG_UNIFORM:
            return f"{self.distribution.value} within [{self.low:g}, {self.high:g}]"
        return f"{self.distribution.value} with nu={self.nu:g} within [{self.low:g}, {self.high:g}]"

    def to_tensor(self, device: torch.device) -> Tensor:
        """Return all of it as int64 numbers, which no change of a model's type rounds, shape ``(8,)``.

        Files hold them: the order of the independent distributions and of the granularities must stay.
        """
        reals = struct.unpack("<4q", struct.pack("<4d", self.nu, self.low, self.high, self.depth))
        places = (
            *(INDEPENDENT.index(self.distribution), GRANULARITIES.index(self.granularity), self.output_axis),
        )
        return torch.tensor([self.key, *reals, *places], dtype=torch.int64, device=device)

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> RateSampling:
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
                f"expected what factors are sampled from, found {numbers.flatten()[:8].tolist()} ({error}); "
                "load a sound checkpoint, or transform the model again"
            ) from error


@functools.lru_cache(maxsize=4096)
def rate_sampling(
    distribution: str,
    nu: float,
    low: float,
    high: float,
    seed: int,
    path: str,
    depth: float = 0.0,
    granularity: str = "element",
    output_axis: int = 0,
) -> RateSampling:
    """Return what a parameter's factors are sampled from.

    Args:
        distribution: name of a :class:`Distribution`.
        nu: as in :class:`RateSampling`.
        low: as in :class:`RateSampling`.
        high: as in :class:`RateSampling`.
        seed: the user's.
        path: path of the parameter.
        depth: as in :class:`RateSampling`.
        granularity: as in :class:`RateSampling`.
        output_axis: as in :class:`RateSampling`.
    """
    return RateSampling(
        distribution=Distribution(distribution),
        nu=nu,
        low=low,
        high=high,
        key=key_for(seed, path, purpose=_PURPOSE),
        depth=depth,
        granularity=granularity,
        output_axis=output_axis,
    )


def sampling_options(
    distribution: Distribution,
    *,
    nu: float,
    low: float,
    high: float,
    log_low: float,
    log_high: float,
    seed: int,
    path: str,
    depth: float,
    granularity: str,
    output_axis: int,
) -> dict[str, Any]:
    """Return the arguments of :func:`rate_sampling`, without those that do not matter.

    Their order is that in which graphs print them, which checkpoints compare.

    Args:
        distribution: of the factors.
        nu: spread of the factors.
        low: lower bound.
        high: upper bound.
        log_low: lower bound of log-uniform factors, which ``low`` does not bound.
        log_high: upper bound of log-uniform factors.
        seed: of the model.
        path: of the parameter.
        depth: matters to ``LAYER_ADAPTIVE`` alone.
        granularity: left out where each synapse has its own factor.
        output_axis: matters where the synapses of a neuron share a factor.
    """
    if distribution is Distribution.LOG_UNIFORM:
        low, high = log_low, log_high
    made: dict[str, Any] = {"distribution": distribution.value, "nu": nu, "low": low, "high": high}
    made |= {"seed": seed, "path": path}
    if depth and distribution is Distribution.LAYER_ADAPTIVE:
        made["depth"] = depth
    if granularity != "element":
        made["granularity"] = granularity
    if granularity == "neuron" and output_axis:
        made["output_axis"] = output_axis
    return made


def pooled_magnitude(weight: Tensor, granularity: str, output_axis: int) -> Tensor:
    """Return mean|w| over the synapses that share a factor: ``weight``'s rank, size 1 along shared axes.

    Args:
        weight: ``(out, in, *)``, or ``(in, out, *)`` where ``output_axis`` is 1.
        granularity: one of :data:`GRANULARITIES`.
        output_axis: the axis that counts the postsynaptic units.
    """
    magnitude = weight.detach().abs()
    if granularity == "element":
        return magnitude
    kept = output_axis if granularity == "neuron" else None
    shared = [axis for axis in range(weight.dim()) if axis != kept]
    return magnitude.mean(shared, keepdim=True) if shared else magnitude


def relative_smallness(values: Tensor, exists: Tensor | None = None) -> Tensor:
    """Return clip(2 - v / mean v, ½, 1½): small weights, and quiet units, vary more than others.

    Args:
        values: not negative, any shape.
        exists: which of them count in the mean, bool; None, or one of another shape, for all.
    """
    counts = exists is not None and exists.shape == values.shape
    mean = mean_where(values, exists) if exists is not None and counts else values.mean()
    relative = torch.where(mean > 0, values / mean, torch.ones_like(values))
    return (2 - relative).clamp(0.5, _LARGEST)


def mean_where(values: Tensor, exists: Tensor) -> Tensor:
    """Return the mean of some values, of shape ``()``.

    Args:
        values: any shape.
        exists: which of them, bool, of the same shape.
    """
    if is_on_host(values):
        return values[exists].mean()
    return torch.where(exists, values, 0).sum() / exists.count_nonzero()  # picking them waits for a count


def most_spread(nu: float) -> float:
    """Return the largest distance from 1 of factors that follow weights or activity, dimensionless."""
    return _LARGEST * nu


def following_factors(
    noise: Tensor, smallness: Tensor | float, *, nu: float, low: float, high: float, generator: Generator
) -> Tensor:
    """Return 1 + ν · c · u; where that leaves the bounds, u is sampled again, in place.

    Args:
        noise: the random part u, any shape.
        smallness: the part c that follows, as :func:`relative_smallness` returns it, broadcastable to u.
        nu: spread of the factors around 1, dimensionless.
        low: lower bound of a factor.
        high: upper bound of a factor.
        generator: a CPU generator, the only source of randomness.

    Raises:
        OptionError: next to nothing of the distribution lies in the bounds.
    """
    spread = (nu * torch.as_tensor(smallness, device=noise.device)).expand(noise.shape)
    factors = 1 + spread * noise
    reach_of_all = most_spread(nu) * (1 + _ROUNDING)
    if low <= 1 - reach_of_all and 1 + reach_of_all <= high:
        return factors  # all lie inside, and which do need not be asked
    outside = ((factors < low) | (factors > high)).flatten().nonzero().flatten()
    if len(outside):
        reach = spread.flatten()[outside].cpu()
        again = torch.empty(len(outside), dtype=torch.float32, device="cpu")
        _for_each_truncated(
            lambda places, count, own: _symmetric(count, own).mul_(reach[places]),
            *(len(outside), low - 1, high - 1, f"factors that vary by up to {float(reach.max()):g}"),
            generator,
            lambda block, part: again[block].copy_(part),
        )
        changes = again.to(noise)
        noise.put_(outside, changes / reach.to(noise))
        factors.put_(outside, (1 + changes).to(factors))
    return factors


def _for_each_truncated(
    sampler: _Sampler,
    count: int,
    low: float,
    high: float,
    what: str,
    generator: Generator,
    take: Callable[[slice, Tensor], object],
) -> None:
    """Sample ``count`` numbers, those outside the bounds again until none is, and hand them over by blocks.

    Args:
        sampler: samples numbers for the positions it is given.
        count: how many.
        low: lower bound.
        high: upper bound.
        what: the numbers, in an error.
        generator: a CPU generator, the only source of randomness.
        take: called once for each block, with its flat positions and its numbers.

    Raises:
        OptionError: next to none of the numbers lies in the bounds; some blocks may have been handed over.
    """

    def fill(block: slice, own: Generator) -> bool:
        part = sampler(block, block.stop - block.start, own)
        for _ in range(_MOST_ROUNDS):
            least, most = part.aminmax()
            if low <= least and most <= high:
                take(block, part)
                return True
            outside = ((part < low) | (part > high)).nonzero().flatten()
            part[outside] = sampler(outside + block.start, len(outside), own).to(part.dtype)
        return False

    if not all(for_each_block(count, fill, generator)):
        raise OptionError(
            f"expected bounds that leave room for {what}, found [{low:g}, {high:g}], which it hardly "
            "ever meets; widen fuzzy_lr_min and fuzzy_lr_max"
        )
