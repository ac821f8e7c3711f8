"""What an optimizer remembers of a parameter, compared with the parameter before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from biofx.errors import CheckpointError
from biofx.plasticity.shards import is_sharded

_LIKE_THE_PARAMETER = frozenset(
    {
        *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg"),
        *("acc_delta", "sum", "prev", "step_size", "ax"),
    }
)
"""What the optimizers of torch keep for each entry of a parameter."""


def check_tensors(
    name: str, parameter: Tensor, saved: Mapping[str, Any], optimizer: Optimizer, *, may_be_sparse: bool
) -> None:
    """Check that what was saved of a parameter can be used with it.

    What only an optimizer of the user's knows the shape of is compared with what it has now, if anything.

    Args:
        name: of the parameter.
        parameter: of the model.
        saved: what the optimizer remembered of it.
        optimizer: what is to go on with that.
        may_be_sparse: whether its gradients are sparse, and with them what is summed of them.

    Raises:
        CheckpointError: a tensor has another shape, layout or kind of numbers, has no values, or is sharded
            where the parameter is whole, or the other way round.
    """
    held = optimizer.state.get(parameter) or {}
    is_torch_s = any(
        cls.__module__.startswith("torch.optim.") and cls is not Optimizer for cls in type(optimizer).__mro__
    )
    for key, value in saved.items():
        now = held.get(key) if isinstance(held, Mapping) else None
        like = is_torch_s and key in _LIKE_THE_PARAMETER
        if isinstance(value, Tensor):
            if may_be_sparse and value.layout == torch.sparse_coo and value.shape == parameter.shape:
                continue
            _check_tensor(f"optimizer: {key!r} of {name!r}", parameter, value, now, like)
        elif (like and value is not None) or isinstance(now, Tensor):
            raise CheckpointError(
                f"optimizer: {key!r} of {name!r}: expected a tensor, found a {type(value).__name__}"
            )


def _check_tensor(where: str, parameter: Tensor, saved: Tensor, now: Any, like_it: bool) -> None:
    if saved.is_meta:
        raise CheckpointError(f"{where}: expected a tensor with values, found one on the meta device")
    expected = parameter if like_it else now if isinstance(now, Tensor) else None
    if expected is not None and expected.shape != saved.shape:
        raise CheckpointError(
            f"{where}: expected shape {tuple(expected.shape)}, found shape {tuple(saved.shape)}"
        )
    if expected is not None and _kind(expected) != _kind(saved):
        raise CheckpointError(f"{where}: expected numbers like {expected.dtype}, found {saved.dtype}")
    if saved.layout != (parameter if expected is None else expected).layout:
        raise CheckpointError(f"{where}: expected layout {parameter.layout}, found {saved.layout}")
    is_whole = saved.shape != parameter.shape or parameter.dim() == 0
    if is_sharded(saved) != is_sharded(parameter) and not (is_whole and not is_sharded(saved)):
        found, other = ("sharded", "whole") if is_sharded(saved) else ("whole", "sharded")
        raise CheckpointError(
            f"{where}: expected a {other} tensor, as the parameter is, found a {found} one; use "
            "biofx.checkpoints.save_sharded and biofx.checkpoints.load_sharded, which fit a state to any "
            "number of ranks"
        )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def check_numbers(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that the options of a group that are numbers were saved as numbers, or as None.

    Raises:
        CheckpointError: one was not.
    """
    for key, value in own.items():
        found = saved.get(key)
        if _is_number(value) and not (_is_number(found) or isinstance(found, (bool, type(None)))):
            raise CheckpointError(
                f"optimizer: expected a number for {key!r}, found {found!r}, a {type(found).__name__}"
            )


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, Tensor) and value.numel() == 1
    return is_one or (isinstance(value, Real) and not isinstance(value, bool))


@torch.no_grad()
def keep_types(optimizer: Optimizer, fitted: Mapping[str, Any]) -> None:
    """Give an optimizer's tensors the types of numbers that they were saved in.

    torch gives them those of the parameters, which loses what an optimizer keeps more exactly than these.
    """
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        return
    numbers = [number for group in fitted["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, saved in fitted["state"].get(number, {}).items():
            held = optimizer.state[parameter].get(key)
            if isinstance(saved, Tensor) and isinstance(held, Tensor) and held.dtype != saved.dtype:
                optimizer.state[parameter][key] = saved.to(held.device, copy=True)
