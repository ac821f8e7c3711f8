"""What graphs call for Dale's principle: weights with the signs of their units, and copies of units.

Masks are slow on plain CPU tensors (a masked fill of a million entries takes 4 ms on one core, a clamp
0.13 ms), and so is fresh memory. What is done with a mask elsewhere is done there with clamps and thresholds,
block by block, and without temporaries as large as a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.errors import OptionError
from biofx.operators.arriving import (
    announced,
    arrival_of,
    groups_to_average,
    is_shared,
    parameter_of,
    refuse_computed,
    remember_parameter,
)
from biofx.operators.dispatch import (
    is_plain_eager,
    is_recorded_below_autograd,
    is_spread,
    outside_graphs,
    overridable,
    refuse_shard,
)
from biofx.operators.exclusive import is_exclusive
from biofx.operators.gradient_memory import is_large, last_memory, remember_memory
from biofx.operators.parts import local, local_part, on_parts
from biofx.operators.sampling import BLOCK

SIGN_METHODS = ("project", "abs")
SIGN_AXES = ("presynaptic", "postsynaptic")
INITIALISATIONS = ("balanced", "keep")
"""What becomes of weights when their units are first given signs."""


@overridable
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
        rows: 1 for the outputs that the constraint holds for and 0 for those that are free, ``(out,)``: the
            rows of the weight, or its columns if ``axis`` is 0; None for all.
        method: ``"project"`` or ``"abs"``.
    """
    if method not in SIGN_METHODS:
        raise OptionError(f"method must be one of {SIGN_METHODS}, found {method!r}")
    signs = signs_like(weight, sign, axis=axis, groups=groups, rows=rows)
    if is_spread(weight):
        refuse_shard(weight)
        return outside_graphs(_constrained_in_parts)(weight, signs, method)
    if method == "abs":
        return _mirrored(weight, signs)
    projected: Tensor
    if is_recorded_below_autograd():
        projected = _recorded_projection(weight, signs)
    elif is_shared():
        projected = outside_graphs(_projected_by_all)(weight, signs)
    else:
        projected = _ProjectSign.apply(weight, signs)  # type: ignore[no-untyped-call]
    return projected


def _mirrored(weight: Tensor, signs: Tensor) -> Tensor:
    mirrored = torch.where(weight >= 0, weight, -weight) * signs
    return torch.where(signs == 0, weight, mirrored)


def _constrained_in_parts(weight: Tensor, signs: Tensor, method: str) -> Tensor:
    """Constrain a weight of which each rank computes with a part."""
    made = on_parts(_mirrored, weight, signs) if method == "abs" else _projected_by_all(weight, signs)
    return remember_parameter(made, weight)


def _projected_by_all(weight: Tensor, signs: Tensor) -> Tensor:
    """Project a weight; its gradient is projected when the ranks, if there are others, have shared theirs."""
    arrival = arrival_of(weight)
    projected: Tensor
    if arrival is None:
        if is_spread(weight):
            return on_parts(_ProjectSign.apply, weight, signs)
        if not weight.is_leaf and parameter_of(weight) is None:
            refuse_computed(groups_to_average())
        projected = _ProjectSign.apply(weight, signs)  # type: ignore[no-untyped-call]
        return projected

    def project(part: Tensor) -> None:
        own = local(arrival.weight.detach())
        project_gradient(part, own, local_part(signs, arrival.weight).to(part.dtype))

    marked = announced(weight, arrival, "signs", project)
    return on_parts(_clamped, marked, signs) if is_spread(weight) else _clamped(marked, signs)


def _clamped(weight: Tensor, signs: Tensor) -> Tensor:
    projected: Tensor = _ClampToSigns.apply(weight, signs)  # type: ignore[no-untyped-call]
    return projected


@torch.no_grad()
def project_gradient(gradient: Tensor, weight: Tensor, signs: Tensor) -> None:
    """Take out of a gradient what leads out of what is permitted, in place.

    Args:
        gradient: of a weight, any shape.
        weight: before the projection, shaped like it.
        signs: broadcastable to it; +1, -1, or 0 where unconstrained.
    """
    weight = weight.to(gradient.dtype)
    if _suits_kernels(weight, signs, gradient):
        rows = weight.flatten(1)
        clamp_gradient(gradient.flatten(1), rows, by_rows(signs, weight), in_place=True)
    else:
        gradient.copy_(_project_backward(gradient, weight, signs))


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
    kernel = (1,) * (weight.dim() - 2)
    outputs = (1, -1, *kernel) if axis == 0 and weight.dim() > 1 else (-1, *(1,) * (weight.dim() - 1))
    return laid_out * rows.to(weight.dtype).reshape(outputs)


def _laid_out(weight: Tensor, sign: Tensor, axis: int, groups: int) -> Tensor:
    if sign.dim() > 1:
        return sign
    kernel = (1,) * (weight.dim() - 2)
    if axis == 0 or weight.dim() < 2:
        return sign.reshape(-1, *(1,) * (weight.dim() - 1))
    if groups == 1:
        return sign.reshape(*(-1 if place == axis else 1 for place in range(weight.dim())))
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
        memory = last_memory(weight) if weight.is_leaf and is_large(weight) else None
        rows = None if memory is None else memory.flatten(1)
        return clamp_to_signs(weight.flatten(1), by_rows(signs, weight), out=rows).view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight, signs = ctx.saved_tensors
        if torch.is_grad_enabled() or not _suits_kernels(weight, signs, gradient):
            return _project_backward(gradient, weight, signs), None
        free = is_exclusive(gradient)  # asked before anything else here refers to it
        rows, laid_out = weight.detach().flatten(1), by_rows(signs, weight)
        result = clamp_gradient(gradient.flatten(1), rows, laid_out, in_place=free)
        if weight.is_leaf and is_large(weight):
            remember_memory(weight, result.untyped_storage())
        return result.view_as(gradient), None


class _ClampToSigns(_ProjectSign):
    """The projection whose gradient is projected somewhere else."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _suits_kernels(weight: Tensor, signs: Tensor, gradient: Tensor | None = None) -> bool:
    """Whether tensors are plain ones of the CPU, laid out for :func:`clamp_to_signs`."""
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
    """The projection where a graph is recorded below autograd: an operator with a backward of its own."""
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


@overridable
def drop_pairs(x: Tensor, training: bool, *, p: float, kind: str, channel_axis: int, units: int) -> Tensor:
    """Return a dropout of ``x`` that drops both copies of a unit, or neither.

    It samples what the dropout of the units would have sampled before they were copied.

    Args:
        x: the copies of each unit side by side, runs of equal length, along ``channel_axis``.
        training: whether anything is dropped.
        p: probability that an entry (or channel) is dropped.
        kind: ``"dropout"``, or ``"dropout1d"`` to ``"dropout3d"`` for whole channels.
        channel_axis: counted from the end.
        units: how many units there are before they are copied, a count.
    """
    if not training:
        return x
    axis = channel_axis % x.dim()
    apart = x.unflatten(axis, (units, 2, -1))
    drops: Callable[..., Tensor] = getattr(F, kind)
    kept = drops(torch.ones_like(apart.select(axis + 1, 0)).flatten(axis, axis + 1), p, True)
    kept = kept.unflatten(axis, (units, -1)).unsqueeze(axis + 1)
    dropped: Tensor = (apart * kept).flatten(axis, axis + 2)
    return dropped


def clamp_to_signs(weight: Tensor, signs: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``weight`` with entries of the wrong sign set to zero.

    Args:
        weight: ``(rows, columns)``, contiguous.
        signs: ``(1, columns)`` or ``(rows, 1 or columns)``; +1, -1, or 0 where unconstrained.
        out: shaped like the weight, to be written to and returned; None for fresh memory.
    """
    low, high = _bounds(-signs)
    return torch.clamp(weight, low, high, out=out)


def clamp_gradient(gradient: Tensor, weight: Tensor, signs: Tensor, *, in_place: bool) -> Tensor:
    """Return the gradient of projected gradient descent: none that leads out of what is permitted.

    Args:
        gradient: ``(rows, columns)``, contiguous.
        weight: before the projection, ``(rows, columns)``, contiguous.
        signs: as in :func:`clamp_to_signs`.
        in_place: whether the gradient itself may be changed.
    """
    result = gradient if in_place else torch.empty_like(gradient)
    low, high = _bounds(signs)
    step = max(1, BLOCK // weight.shape[1])
    inside = weight.new_empty(min(step, len(weight)), weight.shape[1])
    returning = torch.empty_like(inside)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        block, count = gradient[rows], len(gradient[rows])
        own = [bound[rows] if len(bound) > 1 else bound for bound in (signs, low, high)]
        positive, back = inside[:count], returning[:count]
        torch.mul(weight[rows], own[0], out=positive)  # above 0 where a weight is on its permitted side
        torch.clamp(block, own[1], own[2], out=back)  # what leads a weight back, from wherever it is
        outward = torch.sub(block, back, out=result[rows])
        torch.ops.aten.threshold_backward.grad_input(outward, positive, 0, grad_input=outward)
        outward += back
    return result


def write_signs(weight: Tensor, signs: Tensor, *, flip: bool) -> Tensor:
    """Give entries of the wrong sign the right one, or 0, in place.

    Args:
        weight: any shape, layout and device; not recorded for autograd.
        signs: broadcastable to it, in its dtype; +1, -1, or 0 where unconstrained.
        flip: whether a magnitude stays, with the other sign.

    Returns:
        How many entries were changed, a count, float64 of shape ``()`` on the weight's device.
    """
    signs = signs.reshape((1,) * (weight.dim() - signs.dim()) + signs.shape)
    low, high = _bounds(-signs)
    step = max(1, BLOCK * len(weight) // max(1, weight.numel()))
    counts = []
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        block = weight[rows]
        own = [part[rows] if len(part) > 1 else part for part in (signs, low, high)]
        wrong = torch.mul(block, own[0]).clamp_(max=0).sign_()  # -1 where it is, else 0
        counts.append(wrong.sum(dtype=torch.float32))
        if flip:
            block.mul_(wrong.mul_(2).add_(1))
        else:
            block.copy_(torch.clamp(block, own[1], own[2]))
    return -torch.stack(counts).double().sum() if counts else weight.new_zeros((), dtype=torch.float64)


def by_rows(signs: Tensor, weight: Tensor) -> Tensor:
    """Lay signs that broadcast to ``weight`` out for its rows, ``(1 or rows, 1 or columns)``."""
    if weight.dim() == 2 or signs.numel() == len(signs):
        return signs.reshape(len(signs), -1)
    return signs.expand(len(signs), *weight.shape[1:]).reshape(len(signs), -1)


def _bounds(signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what values that point against the signs lie between; nothing bounds them where those are 0."""
    zero, infinite = signs.new_zeros(()), signs.new_full((), torch.inf)
    return torch.where(signs < 0, zero, -infinite), torch.where(signs > 0, zero, infinite)
