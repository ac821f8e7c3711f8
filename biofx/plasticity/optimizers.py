"""What biofx reads from optimizers that it does not know: their options, their state, what they wrap.

All of it is read when it is needed and never kept, because training loops change it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.errors import PlasticityError

FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
"""State that holds a direction: momentum of SGD and RMSprop, the first moment of Adam's family."""
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum")
"""State that normalises a step: of Adam's family, RMSprop, Adamax and Adagrad."""

FORGOTTEN = frozenset({*FIRST_MOMENTS, *SECOND_MOMENTS, "acc_delta", "grad_avg", "prev", "step_size", "step"})
"""State of single elements: these, and those of Adadelta and Rprop, and step counts of elements."""
ITERATES = frozenset({"ax", "z"})
"""State that holds the parameter itself at other times: averaged or schedule-free."""

_DECAYS = frozenset({"wd", "lambd", "l1", "l2", "lambda_1", "lambda_2", "l1_penalty", "l2_penalty"})
_INSIDE = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "inner_optimizer", "optim")
_TRANSPARENT = frozenset(
    {
        *(("accelerate", "AcceleratedOptimizer"), ("pytorch_optimizer", "Lookahead")),
        *(("lightning", "LightningOptimizer"), ("lightning", "_FabricOptimizer")),
        *(("pytorch_lightning", "LightningOptimizer"), ("lightning_fabric", "_FabricOptimizer")),
        *(("torch_optimizer", "Lookahead"), ("timm", "Lookahead")),
    }
)
"""Package and name of the wrappers whose inner optimizer alone changes weights.

Lookahead interpolates between earlier weights, which keeps them in proportion to the factors.
"""


# options of a parameter group


def signature(group: Mapping[str, Any], counters: Collection[str] = ()) -> tuple[Hashable, ...]:
    """Return a key that changes when the way in which a parameter group is stepped may have changed.

    Learning rates are left out, and other numbers count by sign and magnitude only, to a factor of 8, so
    that a schedule does not change the key.

    Args:
        group: options of the optimizer, and its parameters.
        counters: names of the options that the optimizer itself changes at its steps.
    """
    return tuple(
        (name, _kind_of(value))
        for name, value in sorted(group.items())
        if name != "params" and name not in counters and "lr" not in name.split("_")
    )


def without_decay(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group without its parameters, every weight decay set to 0."""
    return {
        name: type(value)(0) if _is_decay(name, value) else value
        for name, value in group.items()
        if name != "params"
    }


def has_decay(group: Mapping[str, Any]) -> bool:
    """Whether an option of a group makes weights decay."""
    return any(_is_decay(name, value) for name, value in group.items())


def decoupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Return the fraction of a weight that decoupled weight decay removes in a step.

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


def _kind_of(value: Any) -> Hashable:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        is_plain = value != 0 and math.isfinite(value)
        return (value > 0, math.frexp(value)[1] // 3) if is_plain else str(float(value))
    if isinstance(value, tuple | list):
        return tuple(map(_kind_of, value))
    return "tensor" if isinstance(value, Tensor) else type(value).__name__


# state


@torch.no_grad()
def forget_direction(optimizer: Optimizer, parameter: nn.Parameter, places: Tensor) -> None:
    """Zero the first moment of some elements and keep the second.

    The second moment normalises the step; without it a new synapse would take a step many times too long
    (a measured |update| / lr of 3.1 when both are zeroed, 0.31 when the first is, 0.08 undisturbed).

    Args:
        optimizer: may have no state yet.
        parameter: whose state is changed.
        places: flat positions, int64.
    """
    state = optimizer.state.get(parameter, {})
    for name in FIRST_MOMENTS:
        moment = state.get(name)
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            moment.put_(places, moment.new_zeros(len(places)))


@torch.no_grad()
def lend_step_sizes(optimizer: Optimizer, parameter: nn.Parameter, new: Tensor, settled: Tensor) -> None:
    """Give new elements the mean second moment of settled ones, where theirs is smaller.

    An element without gradient so far has none, and would take steps many times too long (a measured
    |update| / lr of 1.0 where settled elements take 0.36).

    Args:
        optimizer: may have no state yet.
        parameter: whose state is changed.
        new: flat positions, int64.
        settled: likewise; if there are none, nothing is changed.
    """
    state = optimizer.state.get(parameter, {})
    for name in SECOND_MOMENTS if len(settled) else ():
        moment = state.get(name)
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            mean = moment.take(settled).mean()
            moment.put_(new, torch.maximum(moment.take(new), mean))


@torch.no_grad()
def forget_entries(optimizer: Optimizer, parameter: nn.Parameter, index: tuple[Tensor, ...]) -> None:
    """Let an optimizer know no more of some elements than of new ones.

    Its moments become 0, or what they start at, and so do step counts where each element has its own; further
    iterates of the parameter become the parameter.

    Args:
        optimizer: may have no state yet.
        parameter: whose state is changed; its elements have their new values.
        index: of the elements.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    groups = optimizer.param_groups
    held_by = (group for group in groups if any(held is parameter for held in group["params"]))
    group = next(held_by, optimizer.defaults)
    starts = {"sum": group.get("initial_accumulator_value", 0.0), "step_size": group.get("lr", 0.0)}
    for name, moment in state.items():
        if not isinstance(moment, Tensor) or not moment.dim() or moment.shape != parameter.shape:
            continue
        if name in ITERATES:
            moment[index] = parameter.detach()[index].to(moment.dtype)
        elif name in FORGOTTEN:
            moment[index] = starts.get(name, 0.0)


def may_move_without_gradient(optimizer: Optimizer, weight: Tensor) -> bool:
    """Whether an optimizer has state that could move an element whose gradient is 0."""
    state = optimizer.state.get(weight, {})
    return any(not isinstance(value, Tensor) or value.dim() > 0 for value in state.values())


def unscale_or_skip(optimizer: Optimizer) -> bool:
    """Unscale the gradients of a ``GradScaler``, or return True if it will skip the step.

    The scaler does both itself before the step, except for fused optimizers, which do it inside.
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and bool(found_inf):
        return True
    if scale is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(scale.to(parameter.grad.device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]
    return False


# steps and wrappers


def refuse_closures(optimizer: Optimizer) -> None:
    """Refuse optimizers that evaluate the model several times a step.

    Raises:
        PlasticityError: the optimizer's step requires a closure (LBFGS).
    """
    closure = inspect.signature(inspect.unwrap(type(optimizer).step)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PlasticityError(
            f"{type(optimizer).__name__} searches along a line and evaluates the model several times a "
            "step, so no update belongs to one gradient and factors have no meaning; use another optimizer"
        )


def stepping_optimizer(optimizer: Any, weights: Iterable[Tensor]) -> Optimizer:
    """Return the optimizer whose steps change the weights: the given one, or one that it wraps.

    Args:
        optimizer: the one that the training loop steps.
        weights: the model's.

    Raises:
        PlasticityError: it is not an optimizer, or a wrapper whose own steps change weights or may do so.
    """
    known = {id(weight) for weight in weights}
    inside = inner_optimizer(optimizer)
    while inside is not None and _is_transparent(optimizer):
        optimizer = inside[1]
        inside = inner_optimizer(optimizer)
    name = type(optimizer).__name__
    if isinstance(optimizer, Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer):
        if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
            raise PlasticityError(
                f"{name} steps some of the weights on each rank and copies them to the others; use the "
                "optimizer that it wraps, with DistributedDataParallel or fully_shard"
            )
        return optimizer
    if inside is None:
        found = f"a {name}"
        if callable(optimizer):
            found = f"{getattr(optimizer, '__name__', optimizer)!r}, which has to be called first"
        raise PlasticityError(
            f"expected an optimizer of torch.optim's kind, found {found}; attach to the optimizer that steps "
            "the weights"
        )
    held = {id(weight) for group in inside[1].param_groups for weight in group["params"]}
    if held & known:
        raise PlasticityError(
            f"expected the optimizer that steps the weights, found a {name} around it{_attach_inside(inside)}"
        )
    raise PlasticityError(
        f"{name} wraps a {type(inside[1]).__name__} of weights that are not the model's: it trains "
        "copies, which factors cannot reach; attach to an optimizer of bio_model.parameters()"
    )


def remedy(optimizer: Optimizer) -> str:
    """Return what to do instead of attaching to an optimizer, as the end of a message."""
    inside = inner_optimizer(optimizer)
    return "; use another optimizer, as AdamW or SGD" if inside is None else _attach_inside(inside)


def inner_optimizer(optimizer: Any) -> tuple[str, Optimizer] | None:
    """Return the attribute in which an object has another optimizer, and that optimizer."""
    found = getattr(optimizer, "__dict__", {})
    for name in _INSIDE:
        inner: Any = found.get(name)
        if inner is not optimizer and (isinstance(inner, Optimizer) or hasattr(inner, "param_groups")):
            return name, inner
    return None


def _is_transparent(optimizer: Any) -> bool:
    names = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(optimizer).__mro__}
    return bool(names & _TRANSPARENT)


def _attach_inside(inside: tuple[str, Optimizer]) -> str:
    name, inner = inside
    return (
        f"; attach to optimizer.{name}, the {type(inner).__name__} inside it, if that alone changes weights"
    )
