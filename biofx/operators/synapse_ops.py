"""The few functions that rewritten graphs call.

A rewritten graph outlives the process that made it: it is pickled, traced again, compiled, exported,
vmapped. Each function here keeps its effect through all of these. Two devices do it:

* it hands itself to ``__torch_function__`` first, so a tracer that sees it records *one* call to it
  instead of looking inside (or, worse, running it once);
* its backward is either ordinary differentiable arithmetic or a registered ``torch.library`` operator
  wherever a graph is being recorded below the Python level. A bare ``torch.autograd.Function`` would be
  dropped there without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import handle_torch_function, has_torch_function

from biofx.errors import OptionError, PlasticityError
from biofx.operators import sharded_rates, sign_kernels
from biofx.operators.blocks import multiply_by_blocks
from biofx.operators.exclusive import is_exclusive

SIGN_METHODS = ("project", "abs")
SIGN_AXES = ("presynaptic", "postsynaptic")
INITIALISATIONS = ("balanced", "keep")
"""What becomes of weights when their units are first given signs."""


def scale_gradient(weight: Tensor, factor: Tensor) -> Tensor:
    """Return ``weight`` unchanged; its gradient is multiplied by ``factor`` on the way back.

    The learning rate of each synapse, relative to the optimizer's. The identity is exact to the bit.

    Args:
        weight: any shape.
        factor: broadcastable to ``weight``, dimensionless; it receives no gradient.
    """
    if has_torch_function((weight, factor)):
        return redispatch(scale_gradient, (weight, factor), weight, factor)
    if sharded_rates.is_spread(factor) and not sharded_rates.is_spread(weight):
        return sharded_rates.outside_graphs(sharded_rates.scaled_on_arrival)(weight, factor)
    if is_recorded():
        held = weight.detach()
        return held + (weight - held) * factor.to(weight.dtype)
    refuse_shard(weight)
    return _tensor(_ScaleGradient.apply(weight, factor))  # type: ignore[no-untyped-call]


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
        return _tensor(tangent * factor.to(tangent.dtype))


def constrain_sign(
    weight: Tensor,
    sign: Tensor,
    *,
    axis: int = 1,
    groups: int = 1,
    rows: Tensor | None = None,
    method: str = "project",
) -> Tensor:
    """Return ``weight`` with every synapse of a unit carrying the unit's sign (Dale's principle).

    ``"project"`` sets a weight of the wrong sign to zero. Its gradient is that of projected gradient
    descent: a weight at or beyond zero receives only the gradients that lead back to the permitted side,
    so it can return but cannot drift away. ``"abs"`` returns ``|weight| * sign``; its slope at zero is
    taken from the right, so a weight at zero can move.

    Args:
        weight: a layer's weight, e.g. ``(out, in, *kernel)``.
        sign: +1 excitatory, -1 inhibitory, 0 unconstrained; of any other number its sign. Either one entry
            per unit, shape ``(units,)``, laid along ``axis``, or any shape that broadcasts to ``weight``.
        axis: the axis of ``weight`` that counts the units; 1 is presynaptic for ``(out, in, *)``.
        groups: groups of a grouped convolution, whose weight ``(out, in / groups, *)`` holds for each
            output row the columns of that row's own group.
        rows: 1 for the rows of the weight that the constraint holds for and 0 for those that are free,
            ``(out,)``; None for all.
        method: ``"project"`` or ``"abs"``.
    """
    relevant = (weight, sign) if rows is None else (weight, sign, rows)
    if has_torch_function(relevant):
        return redispatch(
            constrain_sign, relevant, weight, sign, axis=axis, groups=groups, rows=rows, method=method
        )
    if not torch.compiler.is_compiling():
        refuse_shard(weight)
    signs = signs_like(weight, sign, axis=axis, groups=groups, rows=rows)
    if method == "abs":
        mirrored = torch.where(weight >= 0, weight, -weight) * signs
        return _tensor(torch.where(signs == 0, weight, mirrored))
    if method == "project":
        if is_recorded_below_autograd():
            return _tensor(_recorded_projection(weight, signs))
        return _tensor(_ProjectSign.apply(weight, signs))  # type: ignore[no-untyped-call]
    raise OptionError(f"method must be one of {SIGN_METHODS}, found {method!r}")


def signs_like(
    weight: Tensor, sign: Tensor, *, axis: int = 1, groups: int = 1, rows: Tensor | None = None
) -> Tensor:
    """Lay a sign per unit out so that it broadcasts to ``weight``, in the weight's dtype.

    Args:
        weight: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` when transposed.
        sign: ``(units,)``, or already broadcastable (more than one axis).
        axis: the axis of ``weight`` that counts the units.
        groups: groups of the convolution.
        rows: as for :func:`constrain_sign`.

    >>> signs_like(torch.zeros(4, 1, 3), torch.tensor([1, -1]), groups=2).flatten().tolist()
    [1.0, 1.0, -1.0, -1.0]
    """
    # averaged models may hold signs that rounding has left a little off 1
    laid_out = _laid_out(weight, sign.sign().to(weight.dtype), axis, groups)
    if rows is None:
        return laid_out
    return laid_out * rows.to(weight.dtype).reshape(-1, *(1,) * (weight.dim() - 1))


def _laid_out(weight: Tensor, sign: Tensor, axis: int, groups: int) -> Tensor:
    if sign.dim() > 1:
        return sign
    kernel = (1,) * (weight.dim() - 2)
    if axis == 0 or weight.dim() < 2:
        return sign.reshape(-1, *(1,) * (weight.dim() - 1))
    if groups == 1:
        return sign.reshape(1, -1, *kernel)
    return (
        sign.reshape(groups, -1)
        .repeat_interleave(weight.shape[0] // groups, 0)
        .reshape(*weight.shape[:2], *kernel)
    )


def _project(weight: Tensor, signs: Tensor) -> Tensor:
    return weight.masked_fill(weight * signs < 0, 0)


def _project_backward(gradient: Tensor, weight: Tensor, signs: Tensor) -> Tensor:
    outward = (weight * signs <= 0) & (gradient * signs > 0)
    return gradient.masked_fill(outward, 0)


class _ProjectSign(torch.autograd.Function):
    """The projection where autograd runs as it goes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, signs: Tensor) -> Tensor:
        if not _suits_kernels(weight, signs):
            return _project(weight, signs)
        projected = sign_kernels.project(weight.flatten(1), sign_kernels.by_rows(signs, weight))
        return projected.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, signs = ctx.saved_tensors
        if torch.is_grad_enabled() or not _suits_kernels(weight, signs, gradient):
            return _project_backward(gradient, weight, signs), None
        free = is_exclusive(gradient)  # asked before anything else here refers to it
        by_rows, rows = sign_kernels.by_rows(signs, weight), weight.detach().flatten(1)
        result = sign_kernels.project_gradient(gradient.flatten(1), rows, by_rows, in_place=free)
        return result.view_as(gradient), None


def _suits_kernels(weight: Tensor, signs: Tensor, gradient: Tensor | None = None) -> bool:
    """Whether plain tensors lie in memory so that the CPU's own kernels can take them."""
    tensors = (weight, signs) if gradient is None else (weight, signs, gradient)
    return (
        weight.dim() == signs.dim() >= 2
        and weight.numel() > 0
        and is_plain_eager()
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor.device.type == "cpu" and tensor.dtype == weight.dtype for tensor in tensors)
        and weight.is_contiguous()
        and (gradient is None or gradient.is_contiguous())
    )


@torch.library.custom_op("biofx::project_sign", mutates_args=())
def _recorded_projection(weight: Tensor, signs: Tensor) -> Tensor:
    """The projection where a graph is recorded below autograd: an operator that brings its backward."""
    return _project(weight, signs)


@torch.library.custom_op("biofx::project_sign_backward", mutates_args=())
def _recorded_projection_backward(gradient: Tensor, weight: Tensor, signs: Tensor) -> Tensor:
    return _project_backward(gradient, weight, signs)


_recorded_projection.register_fake(lambda weight, signs: torch.empty_like(weight))
_recorded_projection_backward.register_fake(lambda gradient, weight, signs: torch.empty_like(gradient))
_recorded_projection.register_autograd(
    lambda ctx, gradient: (_recorded_projection_backward(gradient, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def pool_synapses(x: Tensor, *, gamma: int, channel_axis: int) -> Tensor:
    """Sum groups of ``gamma`` neighbouring channels and give each member the sum.

    Args:
        x: a layer's output; its size along ``channel_axis`` is a multiple of ``gamma``.
        gamma: synapses per connection, a count.
        channel_axis: counted from the end, so that batched and unbatched inputs agree.

    Returns:
        A tensor shaped like ``x``; samples of a batch do not mix.

    >>> pool_synapses(torch.tensor([1.0, 2.0, 10.0, 20.0]), gamma=2, channel_axis=-1).tolist()
    [3.0, 3.0, 30.0, 30.0]
    """
    if has_torch_function((x,)):
        return redispatch(pool_synapses, (x,), x, gamma=gamma, channel_axis=channel_axis)
    if x.shape[channel_axis] % gamma:
        raise OptionError(
            f"pool_synapses expected the size of axis {channel_axis} to be a multiple of gamma={gamma}, "
            f"found shape {tuple(x.shape)}; choose a gamma that divides the layer's output channels, "
            "and an activation that keeps the shape"
        )
    grouped: Tensor = x.unflatten(channel_axis, (-1, gamma))
    member_axis = channel_axis if channel_axis < 0 else channel_axis + 1
    summed = grouped.sum(member_axis, keepdim=True)
    first = channel_axis - 1 if channel_axis < 0 else channel_axis
    # a single group would stay a view whose members share memory: not to be viewed, nor changed in place
    return summed.expand_as(grouped).flatten(first, member_axis).contiguous()


_MEMORY = 0.1


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
        gamma: how many units each channel of ``x`` stands for, a count.
    """
    if has_torch_function((x, activity, training)):
        options = (
            {"channel_axis": channel_axis} if gamma == 1 else {"channel_axis": channel_axis, "gamma": gamma}
        )
        return redispatch(observe_activity, (x, activity, training), x, activity, training, **options)
    if training and not torch._C._are_functorch_transforms_active() and not _is_recomputed():
        with torch.no_grad():
            axes = [axis for axis in range(-x.dim(), 0) if axis != channel_axis]
            magnitude = x.detach().abs()
            mean = (magnitude.mean(axes) if axes else magnitude).to(activity.dtype)
            mean = mean if gamma == 1 else mean.repeat_interleave(gamma)
            follows = torch.where(activity < 0, mean, torch.lerp(activity, mean, _MEMORY))
            activity.copy_(torch.where(mean.isfinite(), follows, activity))
    return x


def drop_pairs(x: Tensor, training: bool, *, p: float, kind: str, channel_axis: int, units: int) -> Tensor:
    """Return a dropout of ``x`` in which both copies of a unit share their fate.

    Draws what the dropout of the units before they were copied would have drawn.

    Args:
        x: the copies of each unit side by side, runs of equal length, along ``channel_axis``.
        training: whether anything is dropped.
        p: probability that an entry (or channel) is dropped.
        kind: ``"dropout"``, or ``"dropout1d"`` to ``"dropout3d"`` for whole channels.
        channel_axis: counted from the end.
        units: how many units there are before they are copied, a count.
    """
    if has_torch_function((x, training)):
        options: dict[str, Any] = {"p": p, "kind": kind, "channel_axis": channel_axis, "units": units}
        return redispatch(drop_pairs, (x, training), x, training, **options)
    if not training:
        return x
    axis = channel_axis % x.dim()
    apart = x.unflatten(axis, (units, 2, -1))
    drops: Callable[..., Tensor] = getattr(torch.nn.functional, kind)
    kept = drops(torch.ones_like(apart.select(axis + 1, 0)).flatten(axis, axis + 1), p, True)
    kept = kept.unflatten(axis, (units, -1)).unsqueeze(axis + 1)
    return _tensor((apart * kept).flatten(axis, axis + 2))


def _is_recomputed() -> bool:
    """Whether a backward pass is running, which computes what checkpointing did not keep."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_shard(weight: Tensor) -> None:
    """Say what is wrong where torch would say that it cannot mix two kinds of tensors."""
    if hasattr(weight, "device_mesh"):
        raise PlasticityError(
            f"expected a whole weight, found one of shape {tuple(weight.shape)} that is sharded: the graph "
            "reads weights without calling their layers; shard the model as a whole, fully_shard(bio_model)"
        )


def is_recorded() -> bool:
    """Whether operators are being written down: compiled, exported, or traced below autograd."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def is_plain_eager() -> bool:
    """Whether operators run as they are called, on plain tensors, so that a kernel may be chosen."""
    return not is_recorded() and not torch._C._are_functorch_transforms_active()


def is_recorded_below_autograd() -> bool:
    """Whether operators are being written down below autograd, which then never sees our backward."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return get_proxy_mode() is not None


def redispatch(function: Callable[..., Any], relevant: tuple[Any, ...], *args: Any, **kwargs: Any) -> Tensor:
    """Hand a call to whoever overrides torch functions for its arguments: a tracer, a tensor subclass."""
    return _tensor(handle_torch_function(function, relevant, *args, **kwargs))


def _tensor(value: Any) -> Tensor:
    result: Tensor = value
    return result
