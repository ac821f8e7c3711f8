"""Putting a model into training or evaluation, and what that changes besides the flag."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from biofx.graph.regions import is_inside, joined_path
from biofx.model.attribute_guards import MISSING, expectation_of
from biofx.model.copies import deep_copy

Key = tuple[str, str]
"""Path of a module, and name of an attribute of it."""


def switch_mode(model: nn.Module, training: bool) -> nn.Module:
    """Put a model into a mode as its user would, with its own ``train()`` and ``eval()``; return it.

    Where those fail, the flags of all its modules are set and nothing else.
    """
    try:
        model.train() if training else model.eval()
    except Exception:
        for module in model.modules():
            module.training = training
    return model


@dataclass(frozen=True)
class ModeSwitches:
    """What differs between a model in training and the same model in evaluation, by paths in it."""

    are_some: bool = False
    """Whether a class does something of its own when its mode is switched."""
    values: Mapping[Key, tuple[Any, Any]] = field(default_factory=dict)
    """Attributes that follow the flag of their module: the values in training and in evaluation."""
    unclear: frozenset[Key] = frozenset()
    """Attributes that change too, but to values that are not known."""
    rebuilt: frozenset[str] = frozenset()
    """Modules that get other parameters or modules."""
    stuck: Mapping[str, bool] = field(default_factory=dict)
    """Modules whose flag is the same in both modes."""

    def within(self, path: str) -> ModeSwitches:
        """Return the same for one of the modules, by paths in it."""
        if not path or not self.are_some:
            return self
        start = len(path) + 1
        return ModeSwitches(
            True,
            {(p[start:], name): pair for (p, name), pair in self.values.items() if is_inside(p, path)},
            frozenset((p[start:], name) for p, name in self.unclear if is_inside(p, path)),
            frozenset(p[start:] for p in self.rebuilt if is_inside(p, path)),
            {p[start:]: flag for p, flag in self.stuck.items() if is_inside(p, path)},
        )

    def pair(self, prefix: str, path: str, names: tuple[str, ...]) -> tuple[Any, Any] | None:
        """Return what an attribute is in training and in evaluation, None if the flag does not decide.

        Args:
            prefix: path of a module.
            path: path, in that module, of the one that has the attribute.
            names: name of the attribute, and of attributes in it.
        """
        whole = joined_path(prefix, path)
        if names == ("training",):
            return (self.stuck[whole],) * 2 if whole in self.stuck else None
        return self.values.get((whole, names[0])) if len(names) == 1 else None


def switches_of(model: nn.Module) -> ModeSwitches:
    """Return what changes when a copy of a model is put into training, evaluation, and training again."""
    if not _has_own_switch(model):
        return ModeSwitches()
    copied = deep_copy(model)
    with torch.random.fork_rng(devices=[]):
        training, evaluation, again = (
            _Mode(switch_mode(copied, mode), model) for mode in (True, False, True)
        )
    rebuilt = {*training.built_otherwise(evaluation), *training.built_otherwise(again)}
    values: dict[Key, tuple[Any, Any]] = {}
    unclear: set[Key] = set()
    for key, in_training, in_evaluation in training.differences(evaluation):
        follows = training.flags.get(key[0]) is True and evaluation.flags.get(key[0]) is False
        if follows and isinstance(in_training, _PLAIN) and isinstance(in_evaluation, _PLAIN):
            values[key] = in_training, in_evaluation
        else:
            unclear.add(key)
    unclear |= {key for key, _, _ in training.differences(again)}
    stuck = {path: flag for path, flag in training.flags.items() if evaluation.flags.get(path) is flag}
    has_other_tensors = not all(mode.has_the_same_tensors for mode in (training, evaluation, again))
    if not (values or unclear or rebuilt or stuck or has_other_tensors):
        return ModeSwitches()
    return ModeSwitches(
        True,
        {key: pair for key, pair in values.items() if key not in unclear},
        frozenset(unclear),
        frozenset(rebuilt),
        stuck,
    )


def _has_own_switch(model: nn.Module) -> bool:
    """Whether a module of a model does something of its own when its mode is switched."""
    return any(
        type(module).train is not nn.Module.train
        or type(module).eval is not nn.Module.eval
        or not vars(module).keys().isdisjoint(("train", "eval"))
        for module in model.modules()
    )


_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device),
    *(FunctionType, BuiltinFunctionType),
)
"""Types of values that are the same in a copy of a model."""
_TORCHS_OWN = frozenset(vars(nn.Module()))


class _Mode:
    """The state of a copy of a model in one mode."""

    def __init__(self, model: nn.Module, original: nn.Module) -> None:
        held = ((*each.parameters(), *each.buffers()) for each in (model, original))
        self.has_the_same_tensors = all(map(_is_the_same, *held))
        known: dict[int, Any] = {}

        def content(value: Any) -> Any:
            if id(value) not in known:  # many modules hold one config
                known[id(value)] = expectation_of(value, follows=False)
            return known[id(value)]

        modules = dict(model.named_modules())
        self.flags = {path: bool(module.training) for path, module in modules.items()}
        self._built = {path: _structure(module) for path, module in modules.items()}
        self._values = {
            (path, name): (value, content(value))
            for path, module in modules.items()
            for name, value in vars(module).items()
            if name not in _TORCHS_OWN
        }

    def built_otherwise(self, other: _Mode) -> Iterator[str]:
        """Yield the paths of modules that are in both modes, but have other parameters or modules."""
        for path, built in self._built.items():
            if path in other._built and other._built[path] != built:
                yield path

    def differences(self, other: _Mode) -> Iterator[tuple[Key, Any, Any]]:
        """Yield the attributes that differ, and their values."""
        nothing = MISSING, expectation_of(MISSING)
        for key in dict.fromkeys([*self._values, *other._values]):
            (value, before), (found, after) = self._values.get(key, nothing), other._values.get(key, nothing)
            if before != after:
                yield key, value, found


def _is_the_same(found: Tensor, before: Tensor) -> bool:
    alike = (found.shape, found.dtype) == (before.shape, before.dtype)
    alike = alike and found.requires_grad == before.requires_grad
    return alike and (found.is_meta or torch.equal(found, before))


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """Return the class, parameters, buffers and modules of a module, comparable."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        [(name, None if held is None else (held.shape, held.dtype)) for name, held in tensors],
        [(name, id(inner)) for name, inner in module._modules.items()],
    )
