"""What the options of an optimizer's parameter group say, read anew whenever it is asked."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from biofx.errors import PlasticityError

_DECAYS = frozenset({"wd", "lambd", "l1", "l2", "lambda_1", "lambda_2", "l1_penalty", "l2_penalty"})


def signature(group: Mapping[str, Any], counters: Collection[str] = ()) -> tuple[Hashable, ...]:
    """Return what decides how a parameter group is stepped, the same as long as that does not change.

    Learning rates are left out, and of other numbers only sign and magnitude count, to a factor of 8: a
    schedule of theirs makes no other optimizer.

    Args:
        group: options of the optimizer, and its parameters.
        counters: names of the options that the optimizer itself changes as it goes.
    """
    return tuple(
        (name, _kind(value))
        for name, value in sorted(group.items())
        if name != "params" and name not in counters and "lr" not in name.split("_")
    )


def without_decay(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group, its parameters left out and every weight decay set to 0."""
    return {
        name: type(value)(0) if _is_decay(name, value) else value
        for name, value in group.items()
        if name != "params"
    }


def has_decay(group: Mapping[str, Any]) -> bool:
    """Whether some option of a group makes weights decay."""
    return any(_is_decay(name, value) for name, value in group.items())


def decoupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Return the fraction of a weight that decoupled weight decay takes away in a step.

    Raises:
        PlasticityError: the optimizer's weight decay is not decoupled from the gradient.
    """
    if not has_decay(group):
        return 0.0
    known = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")
    if not known or not group.get("weight_decay"):
        raise PlasticityError(
            f"decay='free': {type(optimizer).__name__} mixes weight decay into the gradient, where it cannot "
            "be told apart; use decoupled decay (AdamW), or decay='scaled'"
        )
    return float(group["lr"]) * float(group["weight_decay"])


def _is_decay(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    named = name in _DECAYS or name.endswith(("weight_decay", "_wd", "weight_decay_rate"))
    return named and value != 0


def _kind(value: Any) -> Hashable:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return _magnitude(value)
    if isinstance(value, tuple | list):
        return tuple(_kind(part) for part in value)
    return "tensor" if isinstance(value, Tensor) else type(value).__name__


def _magnitude(number: float) -> Hashable:
    if number == 0 or not math.isfinite(number):
        return str(float(number))
    return number > 0, math.frexp(number)[1] // 3
