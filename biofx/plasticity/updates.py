"""An optimizer's step, changed afterwards: scaled for each synapse, or made multiplicative.

Some optimizers keep more than one iterate of a weight. Averaged gradient descent (``ASGD``) keeps the mean of
the weights so far; schedule-free ones step a sequence z, and train at y, between z and its mean x. Evaluation
uses the mean, so the mean has to move by the factor too.

Sources: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky, "The Road Less Scheduled", NeurIPS 2024:
y = (1 - β) z + β x, and x takes in z with the weight c, so that y moves by 1 - β (1 - c) as far as z.
Exponentiated gradient: Cornford, Pogodin, Ghosh, Sheng, Bicknell, Codol, Clark, Lajoie, Richards, "Brain-like
learning with exponentiated gradients", bioRxiv 2024.10.25.620272; Kivinen, Warmuth, "Exponentiated gradient
versus gradient descent for linear predictors", Information and Computation 132 (1997).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.operators.parts import local, local_part

UPDATES = ("additive", "exponentiated")
_MEAN, _MEAN_WEIGHT = "ax", "mu"
_SEQUENCE, _WEIGHT_SUM = "z", "weight_sum"


class Way(Enum):
    """What factors multiply."""

    GRADIENT = "gradient"
    UPDATE = "update"


@dataclass
class BeforeStep:
    """A weight, and the optimizer's further iterates of it, before a step."""

    weight: Tensor
    """This rank's part."""
    options: Mapping[str, Any]
    sequence: Tensor | None = None
    weight_sum: float = 0.0
    mean_weight: float = 0.0


def remember(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    weight: nn.Parameter,
    copy: Callable[[Tensor], Tensor] = torch.clone,
) -> BeforeStep:
    """Return what :func:`rescale` needs from before a step.

    Args:
        optimizer: about to step.
        group: the weight's.
        weight: whole or sharded.
        copy: makes the copy of the weight.
    """
    before = BeforeStep(copy(local(weight.detach())), group)
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
    before: BeforeStep, optimizer: Optimizer, weight: nn.Parameter, multiplier: Tensor, *, decay: float = 0.0
) -> None:
    """Multiply the step that was taken by factors; a factor of 0 leaves a weight as it was, to the bit.

    Args:
        before: from before the step.
        optimizer: has stepped.
        weight: whole or sharded, changed in place, and with it the optimizer's further iterates.
        multiplier: broadcastable to the whole weight.
        decay: the fraction of the weight that decays whatever the factor.
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
    """Rescale the step of a schedule-free sequence, and move the weight as far as it follows that."""
    group = before.options
    momentum = float(group["betas"][0] if "betas" in group else group["momentum"])
    total = float(group[_WEIGHT_SUM])
    share = 1 - before.weight_sum / total if total else 0.0
    start = before.weight if before.sequence is None else before.sequence
    scaled = torch.lerp(start, sequence, factors)
    followed = part.add(scaled - sequence, alpha=1 - momentum * (1 - share))
    sequence.copy_(scaled)
    part.copy_(torch.where(factors == 0, before.weight, followed))


@torch.no_grad()
def exponentiate(weight: Tensor, old: Tensor, signs: Tensor) -> None:
    """Replace an additive update by a multiplicative one: w = old · exp(sign · (w - old)), in place.

    With plain gradient descent, whose update is -η g, that is old · exp(-η g sign). Weights of 0 stay 0;
    those whose unit has no sign keep their additive update.

    Args:
        weight: after the optimizer's step, any shape.
        old: before it.
        signs: +1, -1 or 0, broadcastable to the weight.
    """
    grown = old * torch.exp((weight - old) * signs)
    weight.copy_(torch.where(signs == 0, weight, grown))


def refuse_decay(path: str, group: Mapping[str, Any]) -> None:
    """Refuse weight decay, which a multiplicative update cannot apply.

    Raises:
        PlasticityError: the parameter group has some.
    """
    if group.get("weight_decay"):
        raise PlasticityError(
            f"updates='exponentiated': expected weight_decay=0 for {path!r}, found {group['weight_decay']}; "
            "a multiplicative update has no place for it"
        )
