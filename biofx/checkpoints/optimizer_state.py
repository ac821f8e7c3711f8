"""An optimizer's state by the names of the parameters, so that it fits any model with the same names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.checkpoints.checkpoint_file import as_checkpoint_error
from biofx.errors import CheckpointError, suggest
from biofx.model.rollback import unchanged_on_failure
from biofx.operators.parts import is_sharded
from biofx.plasticity.model_states import unwrapped

_BY_INDEX = ("params", "param_names")
_LIKE_THE_PARAMETER = frozenset(
    {
        *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg"),
        *("acc_delta", "sum", "prev", "step_size", "ax"),
    }
)
"""State that the optimizers of torch keep for each entry of a parameter."""


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state by the names of the model's parameters.

    A plain model and the model that was transformed from it have the same names of parameters, so the state
    for either fits the other.

    Args:
        model: holds every parameter of the optimizer; wrapped (DDP, ``torch.compile``) or not.
        optimizer: any optimizer.

    Returns:
        Plain values and tensors: ``class``, ``shapes`` of the parameters, ``state`` of each, ``shared`` state
        of them together, ``groups`` with their options, and ``rest``, other entries of its ``state_dict()``.

    Raises:
        CheckpointError: the optimizer steps a parameter of another model, or returns no state.
    """
    with _explained(optimizer, "expected a state_dict() as those of torch.optim give it"):
        return _named(optimizer, _names(model, optimizer), optimizer.state_dict())


def _named(optimizer: Optimizer, names: list[list[str]], packed: dict[str, Any]) -> dict[str, Any]:
    index = {
        number: name
        for group, named in zip(packed["param_groups"], names, strict=True)
        for number, name in zip(group["params"], named, strict=True)
    }
    shapes = {
        name: tuple(parameter.shape)
        for group, named in zip(optimizer.param_groups, names, strict=True)
        for parameter, name in zip(group["params"], named, strict=True)
    }
    return {
        "class": type(optimizer).__name__,
        "shapes": shapes,
        "state": {index[number]: dict(entry) for number, entry in packed["state"].items() if number in index},
        "shared": {key: entry for key, entry in packed["state"].items() if key not in index},
        "groups": [
            {**_options(group), "parameters": named}
            for group, named in zip(packed["param_groups"], names, strict=True)
        ],
        "rest": {key: value for key, value in packed.items() if key not in ("state", "param_groups")},
    }


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state that :func:`optimizer_state` returned into an optimizer.

    Raises:
        CheckpointError: the optimizer steps a parameter of another model, is of another class, or has other
            groups, the state belongs to other parameters, or the optimizer raises; nothing has been changed.
    """
    with unchanged_on_failure(optimizer):
        take_state(optimizer, fitted_state(model, optimizer, state), same_types=False)


def take_state(optimizer: Optimizer, fitted: dict[str, Any], *, same_types: bool) -> None:
    """Load a state that :func:`fitted_state` returned into an optimizer.

    Args:
        optimizer: an error may leave it changed in part.
        fitted: the state.
        same_types: whether the parameters have the dtypes that they had when it was saved.

    Raises:
        CheckpointError: the optimizer raises.
    """
    with _explained(optimizer, "expected an optimizer that takes its own state back"):
        optimizer.load_state_dict(fitted)
        if same_types:
            _keep_types(optimizer, fitted)


@contextmanager
def _explained(optimizer: Optimizer, expected: str) -> Iterator[None]:
    with as_checkpoint_error(f"optimizer: {expected}, found a {type(optimizer).__name__} that raises"):
        yield


def fitted_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a named state in the form that ``optimizer.load_state_dict`` takes, checked.

    Raises:
        CheckpointError: as for :func:`load_optimizer_state`.
    """
    with _explained(optimizer, "expected the state of an optimizer that fits"):
        sparse = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
        }
        return _fitted(optimizer, _names(model, optimizer), state, sparse)


def _fitted(
    optimizer: Optimizer, names: list[list[str]], state: Mapping[str, Any], sparse: set[int]
) -> dict[str, Any]:
    _check_form(state)
    if state["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"expected the state of an optimizer of class {type(optimizer).__name__}, found that of "
            f"{state['class']}"
        )
    found = [sorted(group["parameters"]) for group in state["groups"]]
    if found != [sorted(group) for group in names]:
        raise CheckpointError(
            f"expected the state of an optimizer with these parameters: {_show(names)}; found one with "
            f"these: {_show(found)}. Build the optimizer with the same groups, from model.parameters()"
        )
    packed = optimizer.state_dict()
    numbers: dict[str, Any] = {}
    for group, own, named in zip(packed["param_groups"], optimizer.param_groups, names, strict=True):
        for number, parameter, name in zip(group["params"], own["params"], named, strict=True):
            numbers[name] = number
            if tuple(state["shapes"][name]) != tuple(parameter.shape):
                raise CheckpointError(
                    f"optimizer: expected the state of a parameter {name!r} of shape "
                    f"{tuple(parameter.shape)}, found shape {tuple(state['shapes'][name])}"
                )
            entry = state["state"].get(name, {})
            _check_tensors(name, parameter, entry, optimizer, may_be_sparse=id(parameter) in sparse)
    for own, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        _check_numbers(own, saved)
    groups = [
        {**{key: group[key] for key in _BY_INDEX if key in group}, **_without_names(saved)}
        for group, saved in zip(packed["param_groups"], state["groups"], strict=True)
    ]
    return {
        **state["rest"],
        "state": {
            **{numbers[name]: dict(entry) for name, entry in state["state"].items()},
            **state.get("shared", {}),
        },
        "param_groups": groups,
    }


def _check_tensors(
    name: str, parameter: Tensor, saved: Mapping[str, Any], optimizer: Optimizer, *, may_be_sparse: bool
) -> None:
    """Check that an optimizer's saved state of a parameter fits it.

    State of optimizers that are not torch's is compared with the state that the optimizer has now, if any.

    Args:
        name: of the parameter.
        parameter: of the model.
        saved: the state.
        optimizer: the optimizer to load into.
        may_be_sparse: whether the parameter's gradients are sparse, and with them sums of gradients.

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


def _check_numbers(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that options of a group that are numbers were saved as numbers, flags or None."""
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
def _keep_types(optimizer: Optimizer, fitted: Mapping[str, Any]) -> None:
    """Convert an optimizer's tensors to the dtypes in which they were saved.

    torch converts them to the parameters' dtypes, which may be less exact.
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


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of an optimizer's parameters, group by group."""
    plain_model = unwrapped(model)
    known = {id(parameter): name for name, parameter in reversed([*plain_model.named_parameters()])}
    names = []
    for place, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                raise CheckpointError(
                    f"expected an optimizer of this model's parameters, found one whose group {place} steps "
                    f"a parameter (number {number}, shape {tuple(parameter.shape)}) of another model, "
                    "perhaps the one before biofx.transform. Build it from model.parameters()"
                )
        names.append([known[id(parameter)] for parameter in group["params"]])
    return names


def _check_form(state: Mapping[str, Any]) -> None:
    """Check that a state is one of :func:`optimizer_state`, and not one of ``optimizer.state_dict()``."""
    kinds = {"class": str, "shapes": Mapping, "state": Mapping, "groups": list, "rest": Mapping}
    wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
    if not wrong:
        listed = [name for group in state["groups"] for name in _parameters_of(group)]
        stray = [name for name in (*state["state"], *state["shapes"]) if name not in set(listed)]
        missing = [name for name in listed if name not in state["shapes"]]
        malformed = [name for name, entry in state["state"].items() if not isinstance(entry, Mapping)]
        wrong = [str(name) for name in (*stray, *missing, *malformed)]
    if wrong:
        raise CheckpointError(
            "expected an optimizer's state as biofx.checkpoints.optimizer_state returns it, found one in "
            f"which {wrong[0]!r} is missing or malformed{suggest(wrong[0], state)}"
        )


def _parameters_of(group: Any) -> list[str]:
    names = group.get("parameters") if isinstance(group, Mapping) else None
    if not isinstance(names, list):
        raise CheckpointError("expected groups with the names of their parameters, found one without")
    return names


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _BY_INDEX}


def _without_names(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "parameters"}


def _show(groups: list[list[str]]) -> str:
    shown = [f"{', '.join(names[:6])}{', …' if len(names) > 6 else ''}" for names in groups]
    return "; ".join(f"[{names}]" for names in shown)
