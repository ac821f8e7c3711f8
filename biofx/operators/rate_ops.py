"""What graphs call for the learning rates of synapses: gradients times factors, stored or sampled again.

Factors of a sharded weight (FSDP2) are spread over the ranks as the weight is. In the forward the weight is
whole and its factors are not, so the gradient passes backwards unchanged. The ranks add their gradients up,
each for its part of the weight; what arrives there is multiplied by that part of the factors
(:mod:`biofx.operators.arriving`). Where a layer is computed in parts (tensor parallel), each rank multiplies
the gradient of its part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from biofx.operators.arriving import announced, arrival_at, remember_parameter
from biofx.operators.dispatch import (
    held_back,
    is_plain_eager,
    is_recorded,
    is_recorded_below_autograd,
    is_spread,
    outside_graphs,
    overridable,
    refuse_shard,
)
from biofx.operators.exclusive import is_exclusive
from biofx.operators.parts import is_laid_out_like, layout_of, local, on_parts
from biofx.operators.rate_sampling import RateSampling, rate_sampling
from biofx.operators.sampling import BLOCK
from biofx.torch_private import functorch_is_active, running_backward

_MEMORY = 0.1


@overridable
def scale_gradient(weight: Tensor, factor: Tensor) -> Tensor:
    """Return ``weight`` unchanged; its gradient is multiplied by ``factor`` on the way back.

    The learning rate of each synapse, relative to the optimizer's. The identity is exact to the bit.

    Args:
        weight: any shape.
        factor: broadcastable to ``weight``, dimensionless; it receives no gradient.
    """
    if is_spread(factor) and not (is_spread(weight) and is_laid_out_like(factor, weight)):
        return outside_graphs(_scaled_on_arrival)(weight, factor)
    if is_spread(weight):
        refuse_shard(weight)
        return outside_graphs(_scaled_in_parts)(weight, factor)
    if is_recorded():
        held = held_back(weight)
        return held + (weight - held) * factor.to(weight.dtype)
    scaled: Tensor = _ScaleGradient.apply(weight, factor)  # type: ignore[no-untyped-call]
    return scaled


class _ScaleGradient(torch.autograd.Function):
    """The eager form of :func:`scale_gradient`: a view forwards, one product backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, factor: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        free = is_exclusive(gradient)  # asked before anything else here refers to it
        if factor.dtype != gradient.dtype and is_plain_eager() and not torch.is_grad_enabled():
            result = gradient if free else torch.empty_like(gradient)
            return multiply_by_blocks(gradient, factor, out=result), None
        factor = factor.to(gradient.dtype)
        return gradient.mul_(factor) if free else gradient * factor, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Tensor | None) -> Tensor:
        (factor,) = ctx.saved_tensors
        scaled: Tensor = tangent * factor.to(tangent.dtype)
        return scaled


def multiply_by_blocks(values: Tensor, factors: Tensor, *, out: Tensor) -> Tensor:
    """Write ``values`` times the factors to ``out``, which may be ``values``, and return it.

    Factors of another type are converted block by block, never all at once.

    Args:
        values: of the shape of ``factors``, or one that it broadcasts to.
        factors: dimensionless.
        out: shaped like ``values``.
    """
    if factors.numel() <= BLOCK or factors.dim() != values.dim() or len(factors) != len(values):
        return torch.mul(values, factors.to(values.dtype), out=out)
    step = max(1, BLOCK * len(factors) // factors.numel())
    for start in range(0, len(factors), step):
        rows = slice(start, start + step)
        torch.mul(values[rows], factors[rows].to(values.dtype), out=out[rows])
    return out


@overridable
def scale_gradient_by_seed(
    weight: Tensor,
    *,
    distribution: str,
    nu: float,
    low: float,
    high: float,
    seed: int,
    path: str,
    depth: float = 0.0,
    granularity: str = "element",
    output_axis: int = 0,
) -> Tensor:
    """Return ``weight`` unchanged; its gradient is multiplied by factors that are sampled on the way back.

    What :func:`scale_gradient` does with factors that are stored. The factors depend on the arguments alone:
    they are the same at every backward, and no other random state is touched.

    Args:
        weight: any shape.
        distribution: name of one of :data:`~biofx.operators.rate_sampling.INDEPENDENT`.
        nu: spread of the factors around 1, dimensionless.
        low: lower bound of a factor, dimensionless.
        high: upper bound of a factor, dimensionless.
        seed: the user's seed.
        path: path of the parameter; each has factors of its own.
        depth: place of the layer in execution order, 0 for the first and 1 for the last.
        granularity: what shares a factor, one of :data:`~biofx.operators.rate_sampling.GRANULARITIES`.
        output_axis: the axis of ``weight`` that counts the postsynaptic units.
    """
    source = (distribution, nu, low, high, seed, path, depth, granularity, output_axis)
    scaled: Tensor
    if is_spread(weight):
        refuse_shard(weight)
        scaled = outside_graphs(_part_scaled_by_seed)(weight, source)
    elif is_recorded_below_autograd():
        scaled = _recorded_identity(weight, *source)
    elif torch.compiler.is_compiling():
        scaled = _ScaleGradientBySeed.apply(weight, *source)  # type: ignore[no-untyped-call]
    else:
        scaled = _WithForwardMode.apply(weight, *source)  # type: ignore[no-untyped-call]
    return scaled


GRADIENT_SCALINGS: frozenset[Callable[..., Any]] = frozenset({scale_gradient, scale_gradient_by_seed})
"""The functions that give each synapse a learning rate of its own."""


def sampling_of(node: Node) -> RateSampling:
    """Return what the factors of a node that calls :func:`scale_gradient_by_seed` are sampled from."""
    options: Any = node.kwargs
    return rate_sampling(**options)


class _ScaleGradientBySeed(torch.autograd.Function):
    """The form where autograd runs as it goes: a view forwards, factors sampled and multiplied backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, *source: Any) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.source = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * len(ctx.source)
        if is_plain_eager() and type(gradient) is Tensor and not torch.is_grad_enabled():
            free = is_exclusive(gradient)  # asked before anything else here refers to it
            result = gradient if free else torch.empty_like(gradient)
            return rate_sampling(*ctx.source).multiply(gradient, out=result), *nothing
        return gradient * _sampled_rates(gradient.detach(), *ctx.source), *nothing


class _WithForwardMode(_ScaleGradientBySeed):
    """The same for forward-mode differentiation, which the compiler does not take."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        scaled: Tensor = tangent * _sampled_rates(tangent.detach(), *ctx.source)
        return scaled


@torch.library.custom_op("biofx::drawn_rates", mutates_args=())
def _sampled_rates(
    like: Tensor,
    distribution: str,
    nu: float,
    low: float,
    high: float,
    seed: int,
    path: str,
    depth: float,
    granularity: str,
    output_axis: int,
) -> Tensor:
    """Return the factors where operators are recorded, mapped or differentiated, in the type of ``like``."""
    sampling = rate_sampling(distribution, nu, low, high, seed, path, depth, granularity, output_axis)
    ones = torch.ones_like(like)
    return sampling.multiply(ones, out=ones)


@torch.library.custom_op("biofx::scale_gradient_by_seed", mutates_args=())
def _recorded_identity(
    weight: Tensor,
    distribution: str,
    nu: float,
    low: float,
    high: float,
    seed: int,
    path: str,
    depth: float,
    granularity: str,
    output_axis: int,
) -> Tensor:
    """The form where a graph is recorded below autograd: an operator with a backward of its own."""
    return weight.clone()


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.source = inputs[1:]


def _scale_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient * _sampled_rates(gradient.detach(), *ctx.source), *(None for _ in ctx.source)


def _sampled_for_all(info: Any, axes: tuple[Any, ...], like: Tensor, *source: Any) -> tuple[Tensor, None]:
    """Sample once what all entries of the batch share."""
    return _sampled_rates(like.select(axes[0], 0), *source), None


for _operator in (_sampled_rates, _recorded_identity):
    _operator.register_fake(lambda given, *source: torch.empty_like(given))
_sampled_rates.register_vmap(_sampled_for_all)
_recorded_identity.register_autograd(_scale_back, setup_context=_remember)


@overridable
def observe_activity(
    x: Tensor, activity: Tensor, training: bool, *, channel_axis: int, gamma: int = 1
) -> Tensor:
    """Return ``x``; in training, let ``activity`` follow the mean of ``|x|`` over everything but channels.

    a ← 0.9 a + 0.1 mean|x|, beginning with the first mean. A mean that is not finite, of an empty batch or
    of one that overflows, is not taken. Under ``torch.func`` transforms, whose inputs are not batches,
    nothing is observed, nor when checkpointing computes a forward for the second time.

    Args:
        x: the units' output, any rank.
        activity: ``(channels,)``, changed in place; negative before the first observation.
        training: whether the layer is in training mode.
        channel_axis: counted from the end.
        gamma: units for each channel of ``x``, a count.
    """
    if training and not functorch_is_active() and not is_recomputed():
        with torch.no_grad():
            axes = [axis for axis in range(-x.dim(), 0) if axis != channel_axis]
            magnitude = x.detach().abs()
            mean = (magnitude.mean(axes) if axes else magnitude).to(activity.dtype)
            mean = mean if gamma == 1 else mean.repeat_interleave(gamma)
            follows = torch.where(activity < 0, mean, torch.lerp(activity, mean, _MEMORY))
            activity.copy_(torch.where(mean.isfinite(), follows, activity))
    return x


def is_recomputed() -> bool:
    """Whether a backward pass is running, which computes what checkpointing did not keep."""
    return not torch.compiler.is_compiling() and running_backward() != -1


def _scaled_on_arrival(weight: Tensor, held: Tensor) -> Tensor:
    """Return a weight unchanged; its gradient is multiplied on each rank, once it has arrived there."""

    def multiply(part: Tensor) -> None:
        multiply_by_blocks(part, local(held), out=part)

    return announced(weight, arrival_at(held), "factors", multiply)


def _scaled_in_parts(weight: Tensor, factor: Tensor) -> Tensor:
    return remember_parameter(on_parts(_ScaleGradient.apply, weight, factor), weight)


def _part_scaled_by_seed(weight: Tensor, source: tuple[Any, ...]) -> Tensor:
    def scaled(part: Tensor) -> Tensor:
        found: Tensor = _ScalePartBySeed.apply(part, weight, source)  # type: ignore[no-untyped-call]
        return found

    return remember_parameter(on_parts(scaled, weight), weight)


class _ScalePartBySeed(torch.autograd.Function):
    """A view of this rank's part forwards; backwards, the factors of that part are sampled."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Tensor, source: tuple[Any, ...]) -> Tensor:
        ctx.source, ctx.shape, ctx.layout = source, whole.shape, layout_of(whole)
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        sizes, starts = ctx.layout
        factors = rate_sampling(*ctx.source).factors_of_part(ctx.shape, sizes, starts, gradient.device)
        return gradient * factors.to(gradient.dtype), None, None
