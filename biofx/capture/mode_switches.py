"""What train() and eval() of a model's own classes change besides the flag."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from biofx.graph.regions import is_inside
from biofx.model.contents import MISSING, expectation_of
from biofx.model.copies import deep_copy
from biofx.model.modes import has_own_switch, switch_mode

REBUILT = "gets other parameters or modules in train() or eval(), and so keeps its own forward"
SWITCHED = "reads attribute {!r}, which train() or eval() sets to what a graph cannot follow"
Key = tuple[str, str]
"""Path of a module, and name of an attribute of it."""


@dataclass(frozen=True)
class ModeSwitches:
    """What differs between a model in training and the same in evaluation, by paths in it."""

    are_some: bool = False
    """Whether a class does something of its own when it is switched."""
    values: Mapping[Key, tuple[Any, Any]] = field(default_factory=dict)
    """Attributes that the flag of their module goes with, in training and in evaluation."""
    unclear: frozenset[Key] = frozenset()
    """Attributes that change too, and of which it is not known what they will be."""
    rebuilt: frozenset[str] = frozenset()
    """Modules that get other parameters or modules."""
    stuck: Mapping[str, bool] = field(default_factory=dict)
    """Modules whose flag is the same in both modes."""

    def within(self, path: str) -> ModeSwitches:
        """Return the same by paths in one of the modules."""
        if not path or not self.are_some:
            return self
        start = len(path) + 1

        def local(found: str) -> str:
            return found[start:]

        return ModeSwitches(
            True,
            {(local(p), name): pair for (p, name), pair in self.values.items() if is_inside(p, path)},
            frozenset((local(p), name) for p, name in self.unclear if is_inside(p, path)),
            frozenset(local(p) for p in self.rebuilt if is_inside(p, path)),
            {local(p): flag for p, flag in self.stuck.items() if is_inside(p, path)},
        )

    def pair(self, prefix: str, path: str, names: tuple[str, ...]) -> tuple[Any, Any] | None:
        """Return what an attribute is in training and in evaluation, None where that is one value."""
        whole = ".".join(part for part in (prefix, path) if part)
        if names == ("training",):
            return (self.stuck[whole],) * 2 if whole in self.stuck else None
        return self.values.get((whole, names[0])) if len(names) == 1 else None


def switches_of(model: nn.Module) -> ModeSwitches:
    """Return what changes when a model is put into training, into evaluation, and back; tried on a copy."""
    if not has_own_switch(model):
        return ModeSwitches()
    copied = deep_copy(model)
    with torch.random.fork_rng(devices=[]):
        training, evaluation, again = (
            _Snapshot(switch_mode(copied, mode), model) for mode in (True, False, True)
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
    has_other_tensors = not all(snapshot.has_the_same_tensors for snapshot in (training, evaluation, again))
    if not (values or unclear or rebuilt or stuck or has_other_tensors):
        return ModeSwitches()
    return ModeSwitches(
        True,
        {key: pair for key, pair in values.items() if key not in unclear},
        frozenset(unclear),
        frozenset(rebuilt),
        stuck,
    )


_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device),
    *(FunctionType, BuiltinFunctionType),
)
"""Types of values that are the same in a copy of a model."""


class _Snapshot:
    """How a copy of a model is in one mode."""

    def __init__(self, model: nn.Module, original: nn.Module) -> None:
        self.has_the_same_tensors = _has_the_same_tensors(model, original)
        known: dict[int, Any] = {}

        def content(value: Any) -> Any:
            if id(value) not in known:  # many modules hold one config
                known[id(value)] = expectation_of(value, around=(0,))
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

    def built_otherwise(self, other: _Snapshot) -> Iterator[str]:
        """Yield the paths of modules that are built in another way, and are there in both modes."""
        for path, built in self._built.items():
            if path in other._built and other._built[path] != built:
                yield path

    def differences(self, other: _Snapshot) -> Iterator[tuple[Key, Any, Any]]:
        """Yield the attributes that differ, and their values."""
        nothing = MISSING, expectation_of(MISSING)
        for key in dict.fromkeys([*self._values, *other._values]):
            (value, before), (found, after) = self._values.get(key, nothing), other._values.get(key, nothing)
            if before != after:
                yield key, value, found


_TORCHS_OWN = frozenset(vars(nn.Module()))


def _has_the_same_tensors(model: nn.Module, original: nn.Module) -> bool:
    held = ((*each.parameters(), *each.buffers()) for each in (model, original))
    return all(map(_is_the_same, *held))


def _is_the_same(found: Tensor, before: Tensor) -> bool:
    alike = (found.shape, found.dtype, found.requires_grad) == (
        before.shape,
        before.dtype,
        before.requires_grad,
    )
    return alike and (found.is_meta or torch.equal(found, before))


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """Return what a module is made of, comparable."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        [(name, None if held is None else (held.shape, held.dtype)) for name, held in tensors],
        [(name, id(inner)) for name, inner in module._modules.items()],
    )
