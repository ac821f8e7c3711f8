"""An optimizer's state by the names of the parameters, so that it fits whatever holds the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from biofx.checkpoints.checkpoint_file import as_checkpoint_error
from biofx.checkpoints.optimizer_tensors import check_numbers, check_tensors, keep_types
from biofx.errors import CheckpointError, suggest
from biofx.model.rollback import unchanged_on_failure
from biofx.plasticity.model_states import unwrapped

_BY_INDEX = ("params", "param_names")


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer remembers, by the names of the model's parameters.

    A plain model and the model that was transformed from it give their parameters the same names, so the
    state of either fits the other.

    Args:
        model: holds every parameter of the optimizer; wrapped (DDP, ``torch.compile``) or not.
        optimizer: any optimizer.

    Returns:
        Plain values and tensors: ``class``, ``shapes`` of the parameters, ``state`` of each, ``shared``, what
        the optimizer remembers of them together, ``groups`` with their options, and ``rest``, what it adds of
        its own.

    Raises:
        CheckpointError: the optimizer steps a parameter that is none of the model's, or gives no state.
    """
    with _told_of(optimizer, "expected a state_dict() as those of torch.optim give it"):
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
    """Let an optimizer go on where another one stopped, whose state :func:`optimizer_state` gave.

    Raises:
        CheckpointError: the optimizer steps a parameter that is none of the model's, is of another class, or
            has other groups, the state belongs to other parameters, or the optimizer refuses it; nothing has
            been changed.
    """
    with unchanged_on_failure(optimizer):
        take_state(optimizer, fitted_state(model, optimizer, state), same_types=False)


def take_state(optimizer: Optimizer, fitted: dict[str, Any], *, same_types: bool) -> None:
    """Let an optimizer take over what :func:`fitted_state` gave.

    Args:
        optimizer: changed in part where it fails midway.
        fitted: the state.
        same_types: whether the parameters have the types of numbers that they had when it was saved.

    Raises:
        CheckpointError: it refuses.
    """
    with _told_of(optimizer, "expected an optimizer that takes its own state back"):
        optimizer.load_state_dict(fitted)
        if same_types:
            keep_types(optimizer, fitted)


@contextmanager
def _told_of(optimizer: Optimizer, expected: str) -> Iterator[None]:
    with as_checkpoint_error(f"optimizer: {expected}, found a {type(optimizer).__name__} that raises"):
        yield


def fitted_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a named state in the form that ``optimizer.load_state_dict`` takes, checked.

    Raises:
        CheckpointError: as :func:`load_optimizer_state` says.
    """
    with _told_of(optimizer, "expected the state of an optimizer that fits"):
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
            check_tensors(name, parameter, entry, optimizer, may_be_sparse=id(parameter) in sparse)
    for own, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        check_numbers(own, saved)
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
                    f"a parameter (number {number}, shape {tuple(parameter.shape)}) that is none of them; it "
                    "may be that of the model before biofx.transform. Build it from model.parameters()"
                )
        names.append([known[id(parameter)] for parameter in group["params"]])
    return names


def _check_form(state: Mapping[str, Any]) -> None:
    """Refuse what is no named state, such as a raw ``optimizer.state_dict()``, before it is looked into."""
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
