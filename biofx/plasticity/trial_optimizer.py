"""An optimizer's rule, tried on small parameters of its own."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ROWS = 10
"""Size of a trial parameter along its first axis."""
_COLUMNS, _KERNEL = 6, 3
_LOW_PRECISION = (torch.float16, torch.bfloat16)

Kind = tuple[int, torch.dtype, torch.device]
"""What optimizers tell parameters apart by: number of axes, type, place."""


def kinds_of(parameters: Iterable[Tensor]) -> tuple[Kind, ...]:
    """Return the kinds of some parameters, each once; half precision is tried in single."""
    found: dict[Kind, None] = {}
    for parameter in parameters:
        dtype = torch.float32 if parameter.dtype in _LOW_PRECISION else parameter.dtype
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        found[parameter.dim(), dtype, device] = None
    return tuple(found)


def small_parameters(kinds: Sequence[Kind], generator: torch.Generator) -> list[nn.Parameter]:
    """Return one parameter of each kind, about as large as 1, whose rows have signs in turn.

    Nothing that an optimizer makes of gradients has such signs: what it keeps that looks like the parameter
    is another iterate of it.
    """
    made = []
    signs = torch.tensor((1.0, -1.0)).repeat(ROWS // 2)
    for axes, dtype, device in kinds:
        row = (_COLUMNS, *[_KERNEL] * axes)[: max(axes - 1, 0)]
        values = torch.rand((ROWS, *row), generator=generator, dtype=torch.float64) + 0.5
        made.append(nn.Parameter((signs.reshape(-1, *[1] * len(row)) * values).to(device, dtype)))
    return made


def trial_of(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameters: list[nn.Parameter],
    changed: Mapping[str, Any],
    left_out: Iterable[str],
) -> Optimizer:
    """Return an optimizer of the same class, without state, that steps other parameters.

    What the class has added of its own is copied, with the trial parameters wherever it knew others.

    Args:
        optimizer: not changed.
        group: the one whose options hold.
        parameters: what the trial steps.
        changed: options to set.
        left_out: options that the trial begins without.
    """
    of_axes = {parameter.dim(): parameter for parameter in parameters}
    stand_ins: dict[int, Any] = {
        id(known): of_axes.get(known.dim(), parameters[0])
        for their_group in optimizer.param_groups
        for known in their_group["params"]
    }
    trial: Optimizer = object.__new__(type(optimizer))
    stand_ins[id(optimizer)] = trial
    hooks = [name for name in vars(optimizer) if name.startswith("_optimizer_") and name.endswith("_hooks")]
    own = {
        name: value
        for name, value in vars(optimizer).items()
        if name not in ("step", "state", "defaults", "param_groups", *hooks)
    }
    trial.__dict__.update(
        copy.deepcopy({**own, "defaults": dict(optimizer.defaults)}, stand_ins),
        state=defaultdict(dict),
        **{name: OrderedDict() for name in hooks},
    )
    options = {name: value for name, value in group.items() if name != "params" and name not in left_out}
    trial.param_groups = [{**copy.deepcopy({**options, **changed}), "params": parameters}]
    return trial
