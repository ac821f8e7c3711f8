"""What weights are drawn from when a network is made, and drawing from it again.

The distribution is not measured on weights and not kept: it follows from the layer and the config, so that a
model that was trained before it was transformed, or that is resumed, has the same one. ``"torch"`` is what
``reset_parameters`` of torch's own layers does: U(-1/√n, 1/√n) for linear layers and convolutions, with n
inputs of a unit, and with n hidden units for recurrent ones; Xavier's for the projections of attention. A
masked weight whose connections were rescaled at the start has 1 / √(fraction that exists) times that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from biofx.operators.sampling import for_each_block
from biofx.torch_private import is_initialised_by_torch

if TYPE_CHECKING:
    from biofx.plasticity.bio_state import BioState

_BY_INPUTS: tuple[Any, ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_BY_HIDDEN_UNITS: tuple[Any, ...] = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class InitialWeights:
    """The distribution of a weight at its start, whose mean is 0."""

    is_normal: bool
    """Whether it is normal; else uniform."""
    std: float
    """Standard deviation, in units of weight."""

    def sample(self, count: int, generator: Generator) -> Tensor:
        """Draw from it, float64, ``(count,)``.

        Args:
            count: how many.
            generator: a CPU generator, the only source of randomness.
        """
        made = torch.empty(count, dtype=torch.float64, device="cpu")
        if self.is_normal:
            return made.normal_(0, self.std, generator=generator)
        bound = self.std * math.sqrt(3)
        return made.uniform_(-bound, bound, generator=generator)


ZERO = InitialWeights(is_normal=False, std=0.0)
"""Every weight is 0."""


def initial_weights(state: BioState) -> InitialWeights | str:
    """Return what a weight was drawn from at its start, or in words why that is not known."""
    weight, config = state.weight, state.config
    if state.has_sub_weights or state.is_sub_weight:
        return "it is one of the sub-weights of a connection, which are shares of an initial weight"
    if state.is_expanded or state.reads_pairs:
        return "units on one of its sides are pairs, and so are its weights (dales_method='expand')"
    if weight.is_complex() or weight.dim() < 2:
        return f"it has no initial distribution that is known ({weight.dim()} axes, {weight.dtype})"
    if config.initial_distribution == "torch":
        std = std_by_torch(state)
        if std is None:
            return (
                f"how a {type(state.get_parent()).__name__} is initialised is not known; say it by "
                "initial_distribution='normal' or 'uniform' and initial_gain"
            )
    else:
        std = config.initial_gain / math.sqrt(weight.numel() / max(1, state.units))
    if state.connections is not None and config.weight_mask_initialisation == "rescale":
        std *= math.sqrt(weight.numel() / max(1, state.connections))
    return InitialWeights(config.initial_distribution == "normal", std)


def std_by_torch(state: BioState) -> float | None:
    """Return the standard deviation that torch's own initialisation gives a weight, None if not known."""
    layer, name, weight = state.get_parent(), state.path.rpartition(".")[2], state.weight
    rows, columns = weight.shape[0], weight.shape[1:].numel()
    if isinstance(layer, nn.MultiheadAttention) and name.endswith("proj_weight"):
        own = is_initialised_by_torch(layer)
        return math.sqrt(2 / (rows + columns)) if own else None
    for kinds, count in ((_BY_INPUTS, columns), (_BY_HIDDEN_UNITS, getattr(layer, "hidden_size", 0))):
        for kind in kinds:
            if isinstance(layer, kind):
                own = type(layer).reset_parameters in {base.reset_parameters for base in kinds}
                is_weight = name.startswith("weight")
                return 1 / math.sqrt(3 * count) if own and is_weight and count else None
    return None


@torch.no_grad()
def shrink_and_perturb(
    weight: Tensor,
    initial: InitialWeights,
    *,
    factor: float,
    perturbation: float,
    generator: Generator,
    stays: Tensor | None = None,
    place: slice | None = None,
    total: int | None = None,
) -> int:
    """Shrink a weight and add a new draw of its initial distribution, in place: w ← λ w + σ ξ.

    Source: Ash, Adams, "On warm-starting neural network training", NeurIPS 2020, arXiv 1910.08475.

    Args:
        weight: any shape, real; its storage stays.
        initial: what ξ is drawn from.
        factor: λ, dimensionless.
        perturbation: σ, dimensionless.
        generator: a CPU generator, the only source of randomness.
        stays: where weights stay as they are, bool, broadcastable to ``weight``; None for nowhere.
        place: flat positions of these weights in a larger one; None if they are all of it.
        total: elements of that, a count.

    Returns:
        How many it changed, a count.
    """
    flat = weight.detach().reshape(-1)
    kept = None if stays is None else stays.expand(weight.shape).reshape(-1)

    place = slice(0, len(flat)) if place is None else place

    def perturb(block: slice, own: Generator) -> int:
        start, stop = max(block.start, place.start), min(block.stop, place.stop)
        drawn = initial.sample(block.stop - block.start, own)[start - block.start : stop - block.start]
        drawn, within = drawn.mul_(perturbation), slice(start - place.start, stop - place.start)
        part = flat[within]
        moved = part.double().mul_(factor).add_(drawn.to(part.device)).to(part.dtype)
        if kept is not None:
            moved = torch.where(kept[within], part, moved)
        part.copy_(moved)
        return len(part) if kept is None else int((~kept[within]).sum())

    counts = for_each_block(len(flat) if total is None else total, perturb, generator, within=place)
    if flat.data_ptr() != weight.data_ptr():
        weight.copy_(flat.view(weight.shape))
    return sum(counts)
