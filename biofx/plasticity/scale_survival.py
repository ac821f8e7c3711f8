"""Whether an optimizer lets a factor on the gradient through, found out by trying."""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from biofx.errors import PlasticityError

_STEPS, _FACTOR, _SIZE = 200, 4.0, 16
_LEAST_RATE = 1e-3  # the slope does not depend on it, and smaller steps drown in rounding
_TOLERANCE = 0.02


def scale_survival(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Return the slope of log path length on the log of a constant factor on the gradient.

    1 means that the factor reaches the weights in full (SGD, with or without momentum), 0 that it is lost
    (optimizers that normalise by the gradient's own scale, such as Adam's family). Two small parameters get
    the same random gradients, one of them multiplied, for 200 steps of the optimizer's own rule.

    Args:
        optimizer: not changed; a copy without state takes the steps.
        group: the parameter group whose options hold; weight decay is left out, and so is a learning
            rate of next to 0.

    Raises:
        PlasticityError: the optimizer's step cannot be tried: it needs a closure, or fails on a small
            parameter.
    """
    refuse_closures(optimizer)
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(_STEPS, _SIZE, generator=generator).to(device)
    with torch.random.fork_rng(devices=[]):
        lengths = [_path_length(optimizer, group, gradients * factor) for factor in (1.0, _FACTOR)]
    if not all(0 < length < math.inf for length in lengths):
        raise PlasticityError(
            f"{type(optimizer).__name__} moved a small parameter by {lengths} for gradients of scale 1 and "
            f"{_FACTOR:g}; expected finite steps, to see whether a factor on the gradient survives"
        )
    return math.log(lengths[1] / lengths[0]) / math.log(_FACTOR)


def keeps_gradient_factors(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Return whether a factor on the gradient has its full effect in a parameter group."""
    return abs(scale_survival(optimizer, group) - 1) < _TOLERANCE


def refuse_closures(optimizer: Optimizer) -> None:
    """Refuse optimizers that call the model several times a step.

    Raises:
        PlasticityError: the optimizer's step cannot do without a closure (LBFGS).
    """
    closure = inspect.signature(inspect.unwrap(type(optimizer).step)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PlasticityError(
            f"{type(optimizer).__name__} searches along a line and evaluates the model several times a "
            "step, so no update belongs to one gradient and factors have no meaning; use another optimizer"
        )


def _path_length(optimizer: Optimizer, group: Mapping[str, Any], gradients: torch.Tensor) -> float:
    parameter = nn.Parameter(torch.ones(gradients.shape[1], device=gradients.device))
    options = {name: value for name, value in group.items() if name != "params"}
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    if "lr" in options and float(options["lr"]) < _LEAST_RATE:
        options["lr"] = _LEAST_RATE
    trial = _stateless_copy(optimizer, parameter)
    trial.param_groups = [{**copy.deepcopy(options), "params": [parameter]}]
    length = 0.0
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        trial.step()
        length += float((parameter.detach() - before).norm())
    return length


def _stateless_copy(optimizer: Optimizer, parameter: nn.Parameter) -> Optimizer:
    """Copy what a class of optimizers adds of its own, with ``parameter`` wherever it knew the model's."""
    theirs = [known for group in optimizer.param_groups for known in group["params"]]
    stand_ins: dict[int, Any] = {id(known): parameter for known in theirs}
    left_out = {"step", "state", "param_groups", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}
    trial: Optimizer = object.__new__(type(optimizer))
    stand_ins[id(optimizer)] = trial
    own = {name: value for name, value in vars(optimizer).items() if name not in left_out}
    trial.__dict__.update(
        copy.deepcopy(own, stand_ins),
        state=defaultdict(dict),
        _optimizer_step_pre_hooks=OrderedDict(),
        _optimizer_step_post_hooks=OrderedDict(),
    )
    return trial
