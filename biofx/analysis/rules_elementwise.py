"""Operations that act on each entry by itself: every unit stays where it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from biofx.analysis.flow import RULES, Call, Flow, Rule
from biofx.operators.rate_ops import GRADIENT_SCALINGS, observe_activity
from biofx.operators.sign_ops import constrain_sign, drop_pairs

_MODULES = {name.lower(): cls for name, cls in vars(nn).items() if isinstance(cls, type)}


def everywhere(name: str) -> Iterator[Any]:
    """Yield all that an operation of one name is called in torch: functions, methods, a module class."""
    for spelled in (name, f"{name}_"):
        yield from (getattr(place, spelled) for place in (torch, F) if hasattr(place, spelled))
        if hasattr(torch.Tensor, spelled):
            yield spelled
    module = _MODULES.get(name.replace("_", ""))
    if module is not None:
        yield module


def declare(names: Iterable[str], rule: Rule) -> None:
    """Give operations of these names, however they are called, a rule."""
    for name in names:
        for target in everywhere(name):
            RULES[target] = rule


def keeps(call: Call) -> Flow:
    """Leave every unit where it is, and what is not negative so."""
    return call.keeps()


def never_negative(call: Call) -> Flow:
    """Leave every unit where it is; the result is not negative."""
    return call.keeps(nonnegative=True)


def perhaps_negative(call: Call) -> Flow:
    """Leave every unit where it is; the result may be negative."""
    return call.keeps(nonnegative=False)


def bounded(call: Call) -> Flow:
    """``clamp``, ``hardtanh``: not negative if the lower bound is not."""
    low = call.argument(1, "min", call.argument(1, "min_val"))
    if call.module is not None:
        low = call.module.min_val
    above = isinstance(low, (int, float)) and low >= 0
    return call.keeps(nonnegative=above or call.x.nonnegative)


def turned_over(call: Call) -> Flow:
    """``neg``: what excites would inhibit."""
    return call.ends("it changes the sign of its argument, and excitation turns into inhibition")


_NEVER_NEGATIVE = (*("relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "exp", "exp2", "abs", "square"),)
_PERHAPS_NEGATIVE = (
    *(
        "tanh",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "softsign",
        "logsigmoid",
        "prelu",
        "rrelu",
        "gelu",
        "silu",
    ),
    *("mish", "hardswish", "tanhshrink", "softshrink", "hardshrink", "log", "log1p", "expm1", "threshold"),
    *("erf", "asinh", "atan"),
)
_UNCHANGED = (
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "identity"),
    *("clone", "contiguous", "detach", "requires_grad", "to", "type", "type_as", "float", "double", "half"),
    *("bfloat16", "cuda", "cpu", "nan_to_num", "sqrt", "round", "floor", "ceil", "lift_fresh"),
)

declare(_NEVER_NEGATIVE, never_negative)
declare(_PERHAPS_NEGATIVE, perhaps_negative)
declare(_UNCHANGED, keeps)
declare(("clamp", "clip", "hardtanh"), bounded)
declare(("clamp_min",), bounded)
declare(("neg", "negative"), turned_over)
for _target in (*GRADIENT_SCALINGS, observe_activity, constrain_sign, drop_pairs):
    RULES[_target] = keeps
