"""A step of an optimizer, made smaller or larger afterwards for each synapse.

Some optimizers keep more than one iterate of a weight. Averaged gradient descent (``ASGD``) keeps the mean of
the weights so far; schedule-free ones step a sequence z, and train at y, between z and its mean x. What is
evaluated there is the mean, so it has to move by the factor too.

Source: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky, "The Road Less Scheduled", NeurIPS 2024:
y = (1 - β) z + β x, and x takes in z with the weight c, so that y moves by 1 - β (1 - c) as far as z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.plasticity.shards import local, local_part

_MEAN, _MEAN_WEIGHT = "ax", "mu"
_SEQUENCE, _WEIGHT_SUM = "z", "weight_sum"


class Way(Enum):
    """What factors multiply."""

    GRADIENT = "gradient"
    UPDATE = "update"


@dataclass
class BeforeStep:
    """A weight, and what else the optimizer has of it, before a step."""

    weight: Tensor
    """This rank's part."""
    sequence: Tensor | None = None
    weight_sum: float = 0.0
    mean_weight: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


def remember(optimizer: Optimizer, group: Mapping[str, Any], weight: nn.Parameter) -> BeforeStep:
    """Return what :func:`rescale` has to know from before a step.

    Args:
        optimizer: about to step.
        group: the weight's.
        weight: whole or sharded.
    """
    before = BeforeStep(local(weight.detach()).clone(), options=group)
    state = optimizer.state.get(weight, {})
    if _WEIGHT_SUM in group:
        before.weight_sum = float(group[_WEIGHT_SUM])
        if isinstance(state.get(_SEQUENCE), Tensor):
            before.sequence = local(state[_SEQUENCE]).clone()
    if _MEAN in state and _MEAN_WEIGHT in state:
        before.mean_weight = float(state[_MEAN_WEIGHT])
    return before


@torch.no_grad()
def rescale(
    before: BeforeStep,
    optimizer: Optimizer,
    weight: nn.Parameter,
    multiplier: Tensor,
    *,
    decay: float = 0.0,
) -> None:
    """Let a step that was taken count as much as a factor says; one of 0 leaves a weight as it was.

    Args:
        before: from before the step.
        optimizer: has stepped.
        weight: whole or sharded, changed in place, and with it the optimizer's further iterates.
        multiplier: broadcastable to the whole weight.
        decay: the fraction of the weight that decays in full.
    """
    part, state = local(weight.detach()), optimizer.state.get(weight, {})
    factors = local_part(multiplier, weight).expand_as(part).to(part.dtype)
    sequence = state.get(_SEQUENCE) if _WEIGHT_SUM in before.options else None
    if isinstance(sequence, Tensor):
        _rescale_between(before, part, local(sequence), factors)
        return
    start = before.weight * (1 - decay) if decay else before.weight
    # lerp is exact at 0 and at 1
    scaled = torch.lerp(start, part, factors)
    mean = state.get(_MEAN)
    if isinstance(mean, Tensor) and before.mean_weight == 1:
        local(mean).copy_(scaled)
    elif isinstance(mean, Tensor) and before.mean_weight:
        local(mean).add_(scaled - part, alpha=before.mean_weight)
    part.copy_(scaled)


def _rescale_between(before: BeforeStep, part: Tensor, sequence: Tensor, factors: Tensor) -> None:
    """Rescale the step of a schedule-free sequence, and let the weight follow, as far as it does."""
    group = before.options
    momentum = float(group["betas"][0] if "betas" in group else group["momentum"])
    total = float(group[_WEIGHT_SUM])
    share = 1 - before.weight_sum / total if total else 0.0
    start = before.weight if before.sequence is None else before.sequence
    scaled = torch.lerp(start, sequence, factors)
    followed = part.add(scaled - sequence, alpha=1 - momentum * (1 - share))
    sequence.copy_(scaled)
    part.copy_(torch.where(factors == 0, before.weight, followed))
