"""How important weights are for what was learned, and how that protects them: the formulas.

Sources, with g the gradient of the loss, w a weight, w* its value at the end of the last task:

* Synaptic intelligence: Zenke, Poole, Ganguli, "Continual learning through synaptic intelligence", ICML 2017,
  arXiv 1703.04200. Along a task ω ← ω - g Δw at each step; at its end
  Ω ← max(0, Ω + ω / ((w - w*)² + ξ)), and c Ω (w - w*)² is added to the loss. The bound at 0, without which a
  weight could be driven away, is that of the authors' program.
* Elastic consolidation, online: Schwarz, Luketina, Czarnecki, Grabska-Barwinska, Teh, Pascanu, Hadsell,
  "Progress & compress", ICML 2018, arXiv 1805.06370. At the end of a task Ω ← γ Ω + F with F the diagonal of
  the Fisher information, the mean square of the gradient of each sample's log-likelihood, and
  λ/2 γ Ω (w - w*)² is added to the loss.
* Memory-aware synapses: Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars, ECCV 2018, arXiv 1711.09601. At
  the end of a task Ω ← Ω + the mean over samples of |∂ ‖output‖² / ∂w|, and λ Ω (w - w*)² is added.
* UPGD: Elsayed, Mahmood, "Addressing loss of plasticity and catastrophic forgetting in continual learning",
  ICLR 2024, arXiv 2404.00781, first-order. At each step u ← β u - (1 - β) g w; with û = u / (1 - β^t) and η
  the largest û, w ← w - α (g + ξ) (1 - sigmoid(û / η)), ξ ~ N(0, σ²).
* Regularisation towards the initial weight w0: Kumar, Marklund, Van Roy, "Maintaining plasticity in continual
  learning via regenerative regularization", arXiv 2308.11958: λ (w - w0)² is added to the loss.

What a penalty would add to the gradient of a loss is added before the optimizer's step. That is the same
under any optimizer, except that gradient clipping does not see it: the loss's own gradient is clipped, and
the path of synaptic intelligence is along what clipping has left of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from biofx.operators.dispatch import is_on_host
from biofx.operators.sampling import for_each_block, normal_quantiles, random_levels

_BLOCK = 1 << 17
"""Elements that are worked on at once, so that temporaries stay in the cache and calls are few."""

PENALTIES = {
    "synaptic-intelligence": 2.0,
    "elastic": 1.0,
    "memory-aware": 2.0,
}
"""Derivative of a method's penalty, divided by strength · importance · distance."""


def in_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same parts of tensors of one shape, as views, one after another.

    Tensors on other devices than a CPU, and such as no common view has, come whole.
    """
    first = tensors[0]
    whole = first.numel() <= _BLOCK or not is_on_host(first)
    if whole or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    yield from zip(*(tensor.view(-1).split(_BLOCK) for tensor in tensors), strict=True)


def add_pull(
    gradient: Tensor,
    weight: Tensor,
    anchor: Tensor,
    strength: float,
    importance: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    out: Tensor,
) -> None:
    """Write gradient + strength · importance · (weight - anchor) · scale.

    Args:
        gradient: any shape.
        weight: of the same shape, and so are all others.
        anchor: what the weight is pulled to.
        strength: twice λ for a penalty of λ · importance · distance².
        importance: None for 1.
        scale: what the gradient has been multiplied by, dimensionless; None for 1.
        out: where to, possibly the gradient itself.
    """
    factors = [tensor for tensor in (importance, scale) if tensor is not None]
    for part, made, held, target, *each in in_blocks(gradient, out, weight, anchor, *factors):
        pull = torch.sub(held, target)
        for factor in each:
            pull.mul_(factor)
        torch.add(part, pull.to(made.dtype), alpha=strength, out=made)


def follow_path(path: Tensor, gradient: Tensor, before: Tensor, after: Tensor) -> None:
    """Take one step of the path integral of synaptic intelligence, in place: ω ← ω - g Δw.

    Args:
        path: ω, any shape, in units of loss.
        gradient: of the loss, before the step; of the same shape, and so are all others.
        before: the weight before the step.
        after: the weight after it.
    """
    for total, slope, start, end in in_blocks(path, gradient, before, after):
        total.addcmul_(slope.to(total.dtype), torch.sub(end, start).to(total.dtype), value=-1)


def importance_of_path(importance: Tensor, path: Tensor, distance: Tensor, damping: float) -> Tensor:
    """Return max(0, Ω + ω / (distance² + ξ)).

    Args:
        importance: Ω of earlier tasks, any shape, in units of loss per squared weight.
        path: ω, same shape.
        distance: what the weight moved in the task, same shape.
        damping: ξ.
    """
    return (importance + path / distance.square().add_(damping)).clamp_(min=0)


def rates_of(importance: Tensor, mean: float, strength: float) -> Tensor:
    """Return 1 / (1 + strength · Ω / mean Ω), dimensionless, 1 where nothing is important.

    Args:
        importance: Ω, any shape.
        mean: of all of it.
        strength: dimensionless.
    """
    return (importance * (strength / (mean or 1.0))).add_(1).reciprocal_()


def follow_utility(utility: Tensor, gradient: Tensor, weight: Tensor, decay: float) -> None:
    """Take one step of the utility of UPGD, in place: u ← β u - (1 - β) g w.

    Where g w is not finite, u stays.

    Args:
        utility: u, any shape, in units of loss.
        gradient: of the loss, same shape.
        weight: same shape.
        decay: β, dimensionless.
    """
    for mean, slope, held in in_blocks(utility, gradient, weight):
        slope, held = slope.to(mean.dtype), held.to(mean.dtype)
        if is_surely_finite(slope, held):
            mean.mul_(decay).addcmul_(slope, held, value=decay - 1)
        else:
            product = slope * held
            mean.copy_(torch.where(product.isfinite(), mean * decay + (decay - 1) * product, mean))


def is_surely_finite(tensor: Tensor, other: Tensor) -> bool:
    """Whether all products of two tensors are finite; False where only the device would know, or in doubt."""
    return is_on_host(tensor) and math.isfinite(torch.dot(tensor.reshape(-1), other.reshape(-1)))


def gate_of(utility: Tensor, largest: Tensor) -> Tensor:
    """Return what an update is multiplied by: 1 - sigmoid(u / largest), dimensionless; ½ if that is 0.

    Args:
        utility: u, any shape.
        largest: of the network or the layer, shape ``()``; the correction of the bias of both cancels where
            they are equally old.
    """
    share = torch.where(largest == 0, 0.0, -1 / torch.where(largest == 0, 1.0, largest))
    return (utility * share).sigmoid_()


def noise_of(count: int, deviation: float, generator: torch.Generator, within: slice | None) -> Tensor:
    """Sample N(0, deviation²) without its tails beyond 4.3 deviations, float32 on the CPU.

    Args:
        count: of the whole weight.
        deviation: standard deviation, in units of gradient.
        generator: a CPU generator, the only source of randomness.
        within: the elements that are needed; None for all.

    Returns:
        Those elements, flat.
    """
    table = normal_quantiles() * deviation
    span = slice(0, count) if within is None else within
    drawn = torch.empty(span.stop - span.start)

    def sample(block: slice, own: torch.Generator) -> None:
        start, stop = max(block.start, span.start), min(block.stop, span.stop)
        needed = slice(start - block.start, stop - block.start)
        levels = random_levels(block.stop - block.start, own)[needed].int()
        torch.index_select(table, 0, levels, out=drawn[start - span.start : stop - span.start])

    for_each_block(count, sample, generator, within=span)
    return drawn
