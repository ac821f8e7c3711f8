"""Gradient inversion: what someone who sees the gradients of one image learns of its label and pixels.

Sources: the label from the signs of the readout's gradients: Zhao, Mopuri, Bilen, "iDLG: Improved deep
leakage from gradients", 2020, arXiv 2001.02610. Matching gradients by their squared distance with L-BFGS:
Zhu, Liu, Han, "Deep leakage from gradients", NeurIPS 2019. Matching their directions with signed Adam, total
variation and pixels kept in range, and reading the input of a fully connected layer off its gradients:
Geiping, Bauermeister, Dröge, Moeller, "Inverting gradients", NeurIPS 2020, arXiv 2003.14053.

Deviations: the label is recovered first and held, in both matchings, as iDLG does; L-BFGS searches along
lines (strong Wolfe), starts again where it is caught, and stops where its loss stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Gradients = tuple[Tensor, ...]
"""One tensor a parameter, shaped as it."""
_EXACT = 1e-9
"""A loss that no search improves on: of squared distances relative to the gradients' squared size."""
_STILL = 1e-3
"""The share of its loss that a step of L-BFGS must gain for the search to go on."""


def gradients(model: nn.Module, image: Tensor, label: int, *, differentiable: bool = False) -> Gradients:
    """Return the gradients of the cross-entropy of one image in a model's trainable parameters.

    Args:
        model: maps ``(1, channels, height, width)`` to logits ``(1, classes)``.
        image: ``(channels, height, width)``.
        label: the image's class.
        differentiable: whether the gradients can be differentiated by the image.
    """
    loss = F.cross_entropy(model(image[None]), torch.tensor([label]))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, parameters, create_graph=differentiable)


def recover_label(readout: Tensor) -> int:
    """Return the label that the gradient of the readout's weight tells, ``(classes, inputs)``.

    Row i is (probability of i, minus 1 for the label) times the readout's inputs: where these are not
    negative, the label's row alone has a negative sum. Positive factors on the elements change no sign.
    """
    return int(readout.sum(1).argmin())


def read_input(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the input of a fully connected layer from its gradients, ``(units, inputs)`` and ``(units,)``.

    A unit's row is its bias's gradient times the input; of all units the least-squares solution is returned,
    in which factors that scatter around 1 average out.
    """
    return (bias @ weight) / bias.square().sum()


@dataclass(frozen=True)
class Matching:
    """How an image is searched whose gradients match those that were seen."""

    objective: str
    """``"distance"``: their squared distance, relative to their size, by L-BFGS; ``"direction"``: 1 minus
    their cosine plus total variation, by signed Adam."""
    steps: int
    """Steps of the optimizer, a count; one of L-BFGS iterates up to 20 times."""
    starts: int = 1
    """Images that the search starts from, a count; the best match is kept, and one that is as good as exact
    ends the search."""
    rate: float = 0.1
    """Step size of Adam, in pixel values; it falls to a tenth three times."""
    variation: float = 1e-4
    """Weight of the total variation in ``"direction"``, dimensionless."""


def reconstruct(
    simulate: Callable[[Tensor], Gradients],
    seen: Sequence[Tensor],
    shape: Sequence[int],
    matching: Matching,
    generator: torch.Generator,
) -> Tensor:
    """Return an image whose simulated gradients match those that were seen, pixels in [0, 1].

    Args:
        simulate: gradients of an image in what the attacker takes for the model, differentiable.
        seen: the gradients that were shared.
        shape: channels, height and width.
        matching: what is minimised, and how.
        generator: of the image that the search starts from.
    """
    match = _by_distance if matching.objective == "distance" else _by_direction
    best, least = torch.zeros(*shape, dtype=seen[0].dtype), math.inf
    for _ in range(matching.starts):
        start = torch.randn(*shape, generator=generator, dtype=seen[0].dtype)
        found, loss = match(start.requires_grad_(), simulate, seen, matching)
        if loss < least:
            best, least = found, loss
        if loss < _EXACT:
            break
    return best.clamp(0, 1)


def _by_distance(
    image: Tensor, simulate: Callable[[Tensor], Gradients], seen: Sequence[Tensor], matching: Matching
) -> tuple[Tensor, float]:
    size = float(torch.stack([gradient.square().sum() for gradient in seen]).sum())
    optimizer = torch.optim.LBFGS([image], line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        pairs = zip(simulate(image), seen, strict=True)
        distance = torch.stack([(own - other).square().sum() for own, other in pairs]).sum() / size
        (image.grad,) = torch.autograd.grad(distance, image)
        return distance.detach()

    before = math.inf
    for _ in range(matching.steps):
        now = float(optimizer.step(loss))
        if now < _EXACT or not now < (1 - _STILL) * before:
            break
        before = now
    return image.detach(), float(loss())


def _by_direction(
    image: Tensor, simulate: Callable[[Tensor], Gradients], seen: Sequence[Tensor], matching: Matching
) -> tuple[Tensor, float]:
    optimizer = torch.optim.Adam([image], lr=matching.rate)
    falls = [int(matching.steps * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls)
    wanted = torch.cat([gradient.flatten() for gradient in seen])
    loss = torch.tensor(math.inf)
    for _ in range(matching.steps):
        found = torch.cat([gradient.flatten() for gradient in simulate(image)])
        loss = 1 - F.cosine_similarity(found, wanted, dim=0) + matching.variation * total_variation(image)
        (slope,) = torch.autograd.grad(loss, image)
        image.grad = slope.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            image.clamp_(0, 1)
    return image.detach(), float(loss.detach())


def total_variation(image: Tensor) -> Tensor:
    """Return the mean difference between neighbouring pixels of ``(channels, height, width)``."""
    return image.diff(dim=1).abs().mean() + image.diff(dim=2).abs().mean()


def error(found: Tensor, true: Tensor) -> float:
    """Return the mean squared error of the pixels, in units of the range of pixel values squared."""
    return float((found - true).square().mean())


def peak_ratio(found: Tensor, true: Tensor) -> float:
    """Return the peak signal-to-noise ratio of pixels in [0, 1], in dB, at most 100."""
    return -10 * math.log10(max(error(found, true), 1e-10))


def similarity(found: Tensor, true: Tensor) -> float:
    """Return the structural similarity of pixels in [0, 1], 1 for equal images, dimensionless.

    Source: Wang, Bovik, Sheikh, Simoncelli, IEEE Transactions on Image Processing 13 (2004), eq. 13, with its
    constants (0.01 and 0.03), over uniform windows of 7 by 7 pixels.
    """
    size = 7

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values[None], size, stride=1)

    ours, theirs = mean(found), mean(true)
    unbiased = size**2 / (size**2 - 1)
    variances = unbiased * (mean(found.square()) - ours.square() + mean(true.square()) - theirs.square())
    covariance = unbiased * (mean(found * true) - ours * theirs)
    small, smaller = 0.03**2, 0.01**2
    likeness = (2 * ours * theirs + smaller) * (2 * covariance + small)
    return float((likeness / ((ours.square() + theirs.square() + smaller) * (variances + small))).mean())
