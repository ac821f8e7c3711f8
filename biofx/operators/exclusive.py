"""Whether nothing else holds a gradient that arrives in a backward, so that it may be changed in place.

torch does not say. It shows in reference counts, which differ between versions of Python and torch; so they
are not listed here but taken once, of gradients that are known to be free and of others that are known to be
held. Where the two cannot be distinguished, nothing counts as free.

What it saves is fresh memory as large as the weights: 10 to 20 % of a training step of fully connected
networks (3072-3000-3000-100 at batch 100, 1024-1024-1024-10 at batch 8; rates, with and without signs; CPU
time on one thread, medians of 100 to 200 alternations), and nothing measurable with convolutions.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from biofx.torch_private import (
    count_of_dispatch_modes,
    count_of_function_modes,
    functorch_is_active,
    storage_use_count,
    use_count,
)

Signature: TypeAlias = tuple[int, ...]


def is_exclusive(gradient: Tensor) -> bool:
    """Return whether a backward, which must be the direct caller, may change its gradient in place.

    True only for a dense tensor that autograd has just made for this backward and drops behind it: no hook
    and no caller of ``torch.autograd.grad`` holds it, or memory that it shares. ``retain_grad`` takes a copy.
    """
    if type(gradient) is not Tensor or torch.is_grad_enabled() or _is_watched():
        return False
    if not gradient.is_contiguous():
        return False
    return _signature(gradient) in _free_signatures()


def _is_watched() -> bool:
    """Whether calls pass through a mode or transform on their way, which may hold what is counted."""
    return bool(functorch_is_active() or count_of_dispatch_modes() or count_of_function_modes())


def _signature(gradient: Tensor) -> Signature:
    base: Any = gradient._base
    storage: Any = gradient.untyped_storage()
    held: Any = gradient
    of_base = () if base is None else (use_count(base), sys.getrefcount(base))
    shared = storage_use_count(storage)
    return (use_count(held), sys.getrefcount(gradient), shared, *of_base)


class _Probe(torch.autograd.Function):
    """Notes the signature of each gradient that passes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, note: Callable[[Signature], None]) -> Tensor:
        ctx.note = note
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.note(_noted(gradient))
        return gradient, None


def _noted(gradient: Tensor) -> Signature:
    """Be a frame between the backward and the signature, as :func:`is_exclusive` is."""
    return _signature(gradient)


@functools.cache
def _free_signatures() -> frozenset[Signature]:
    """Return the signatures of free gradients, without those that held ones have too."""
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return frozenset(_seen(_FREE)) - frozenset(_seen(_HELD))
    except (AttributeError, RuntimeError):  # a torch without these counts
        return frozenset()


def _seen(uses: tuple[Callable[[Tensor], None], ...]) -> list[Signature]:
    seen: list[Signature] = []
    for use in uses:
        weight = torch.zeros(4, 4, requires_grad=True)
        use(_Probe.apply(weight, seen.append))  # type: ignore[no-untyped-call]
    return seen


def _linear(weight: Tensor) -> Tensor:
    return F.linear(torch.zeros(3, 4), weight).sum()


def _held_by_hook(weight: Tensor, use: Callable[[Tensor], Tensor] = _linear) -> None:
    kept: list[Tensor] = []
    weight.register_hook(kept.append)
    use(weight).backward()


def _held_base(weight: Tensor) -> None:
    shift = torch.zeros(16, requires_grad=True)
    (weight.view(16) + shift).backward(torch.zeros(16))


def _held_base_elsewhere(weight: Tensor) -> None:
    kept: list[Tensor | None] = []

    def keep(gradient: Tensor) -> None:
        kept.append(gradient._base)

    weight.register_hook(keep)
    _linear(weight).backward()


def _captured(weight: Tensor) -> None:
    (leaf, _), *_ = weight.grad_fn.next_functions  # type: ignore[union-attr]
    torch.autograd.grad(_linear(weight), [weight, leaf.variable])  # type: ignore[union-attr]


_FREE: tuple[Callable[[Tensor], None], ...] = (
    lambda weight: _linear(weight).backward(),
    lambda weight: F.linear(torch.zeros(3, 4), weight, torch.zeros(4, requires_grad=True)).sum().backward(),
    lambda weight: F.linear(torch.zeros(2, 3, 4), weight).sum().backward(),
    lambda weight: F.linear(torch.zeros(3, 4, requires_grad=True), weight).sum().backward(),
    lambda weight: F.conv1d(torch.zeros(1, 4, 3), weight.unsqueeze(2)).sum().backward(),
    lambda weight: (weight * 2).sum().backward(),
)
_HELD: tuple[Callable[[Tensor], None], ...] = (
    _held_by_hook,
    lambda weight: _held_by_hook(weight, lambda held: (held * 2).sum()),
    _held_base,
    _held_base_elsewhere,
    lambda weight: weight.backward(torch.zeros(4, 4)),
    lambda weight: (weight + torch.zeros(4, 4, requires_grad=True)).backward(torch.zeros(4, 4)),
    lambda weight: (weight.t() + torch.zeros(4, 4, requires_grad=True)).backward(torch.zeros(4, 4)),
    _captured,
)
