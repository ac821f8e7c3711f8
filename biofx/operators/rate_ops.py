"""What graphs call whose learning-rate factors are drawn again at every backward.

See :mod:`biofx.operators.synapse_ops` for what the functions of rewritten graphs owe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.overrides import has_torch_function

from biofx.operators import synapse_ops as ops
from biofx.operators.exclusive import is_exclusive
from biofx.operators.rate_draws import RateDraw, rate_draw, told_of_place
from biofx.operators.synapse_ops import is_plain_eager, is_recorded_below_autograd, redispatch, refuse_shard


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
    """Return ``weight`` unchanged; its gradient is multiplied by factors that are drawn on the way back.

    What :func:`~.synapse_ops.scale_gradient` does with factors that are stored. The draws depend on the
    arguments alone: they are the same at every backward, and no other random state is touched.

    Args:
        weight: any shape.
        distribution: name of one of :data:`biofx.config.INDEPENDENT`.
        nu: spread of the factors around 1, dimensionless.
        low: lower bound of a factor, dimensionless.
        high: upper bound of a factor, dimensionless.
        seed: the user's seed.
        path: path of the parameter, which each has draws of its own for.
        depth: place of the layer in execution order, 0 for the first and 1 for the last.
        granularity: what shares a factor, one of :data:`biofx.config.GRANULARITIES`.
        output_axis: the axis of ``weight`` that counts the postsynaptic units.
    """
    if has_torch_function((weight,)):
        options: dict[str, Any] = {"distribution": distribution, "nu": nu, "low": low, "high": high}
        options |= {"seed": seed, "path": path} | told_of_place(depth, granularity, output_axis)
        return redispatch(scale_gradient_by_seed, (weight,), weight, **options)
    drawn = (distribution, nu, low, high, seed, path, depth, granularity, output_axis)
    if is_recorded_below_autograd():
        return _tensor(_recorded_identity(weight, *drawn))
    if not torch.compiler.is_compiling():
        refuse_shard(weight)
        return _tensor(_WithForwardMode.apply(weight, *drawn))  # type: ignore[no-untyped-call]
    return _tensor(_ScaleGradientBySeed.apply(weight, *drawn))  # type: ignore[no-untyped-call]


GRADIENT_SCALINGS: frozenset[Callable[..., Any]] = frozenset({ops.scale_gradient, scale_gradient_by_seed})
"""The functions that give each synapse a learning rate of its own."""


def draw_of(node: Node) -> RateDraw:
    """Return what the factors of a node that calls :func:`scale_gradient_by_seed` are drawn from."""
    options: Any = node.kwargs
    return rate_draw(**options)


class _ScaleGradientBySeed(torch.autograd.Function):
    """The form where autograd runs as it goes: a view forwards, draws and one product backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, *drawn: Any) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.drawn = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * len(ctx.drawn)
        if is_plain_eager() and type(gradient) is Tensor and not torch.is_grad_enabled():
            free = is_exclusive(gradient)  # asked before anything else here refers to it
            result = gradient if free else torch.empty_like(gradient)
            return rate_draw(*ctx.drawn).multiply(gradient, out=result), *nothing
        return gradient * _drawn_rates(gradient.detach(), *ctx.drawn), *nothing


class _WithForwardMode(_ScaleGradientBySeed):
    """The same for forward-mode differentiation, which the compiler does not take."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _tensor(tangent * _drawn_rates(tangent.detach(), *ctx.drawn))


@torch.library.custom_op("biofx::drawn_rates", mutates_args=())
def _drawn_rates(
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
    """The factors, where operators are recorded, mapped or differentiated; of the type of ``like``."""
    draw = rate_draw(distribution, nu, low, high, seed, path, depth, granularity, output_axis)
    ones = torch.ones_like(like)
    return draw.multiply(ones, out=ones)


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
    """The form where a graph is recorded below autograd: an operator that brings its backward."""
    return weight.clone()


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.drawn = inputs[1:]


def _scale_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient * _drawn_rates(gradient.detach(), *ctx.drawn), *(None for _ in ctx.drawn)


def _drawn_for_all(info: Any, axes: tuple[Any, ...], like: Tensor, *drawn: Any) -> tuple[Tensor, None]:
    """Draw once what all samples share."""
    return _drawn_rates(like.select(axes[0], 0), *drawn), None


for _operator in (_drawn_rates, _recorded_identity):
    _operator.register_fake(lambda given, *drawn: torch.empty_like(given))
_drawn_rates.register_vmap(_drawn_for_all)
_recorded_identity.register_autograd(_scale_back, setup_context=_remember)


def _tensor(value: Any) -> Tensor:
    result: Tensor = value
    return result
