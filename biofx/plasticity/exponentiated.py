"""Exponentiated gradient: a synapse changes in proportion to its strength, and never changes its sign.

Source: Cornford, Pogodin, Ghosh, Sheng, Bicknell, Codol, Clark, Lajoie, Richards, "Brain-like learning with
exponentiated gradients", bioRxiv 2024.10.25.620272; Kivinen, Warmuth, "Exponentiated gradient versus gradient
descent for linear predictors", Information and Computation 132 (1997).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from biofx.errors import PlasticityError

UPDATES = ("additive", "exponentiated")


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
    """Refuse weight decay, which an exponential of the update would not apply as decay.

    Raises:
        PlasticityError: the parameter group has some.
    """
    if group.get("weight_decay"):
        raise PlasticityError(
            f"updates='exponentiated': expected weight_decay=0 for {path!r}, found {group['weight_decay']}; "
            "a multiplicative update has no place for it"
        )
