"""Attributes that decided something while a forward was captured, and that must not change after that.

A number that only flows into arithmetic is read by a node at every call. What else a forward reads from its
modules (flags, texts, counts, settings) has settled how its graph looks, so every call makes sure that it is
what it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from biofx.errors import CaptureError
from biofx.graph.regions import joined_path
from biofx.model.contents import MISSING, IsEqual, IsNumber, described, expectation_of

GUARDS = "_attribute_guards"
"""The attribute of a graph module that holds what its graph takes for granted."""


@dataclass(frozen=True)
class Guard:
    """What one attribute has to be."""

    names: tuple[str, ...]
    """Of the attribute, the first one of the module, the next of what that holds."""
    owner: str
    """The module, for a reader."""
    path: str
    """Path of the module in the whole model."""
    where: str
    """File and line that read it."""
    in_training: Any
    """What is expected of it where the module is in training."""
    in_evaluation: Any
    """Likewise in evaluation."""

    def check(self, module: nn.Module) -> None:
        """Refuse to go on with another value.

        Raises:
            CaptureError: the attribute is not what it was.
        """
        expected = self.in_training if module.training else self.in_evaluation
        found = value_at(module, self.names)
        if not expected.fits(found):
            self._refuse(expected, found, module.training)

    def _refuse(self, expected: Any, found: Any, training: bool) -> NoReturn:
        mode = ("training", "evaluation")[not training] if self.in_training != self.in_evaluation else ""
        raise CaptureError(
            f"attribute {'.'.join(self.names)!r} of {self.owner}: expected {expected}, with which the model "
            f"was captured{f' in {mode}' if mode else ''}, found {described(found)}; {self.where} reads it, "
            "and the graph holds what follows from it. Set it back, or set it ahead of the transform"
            + (f", or name the module in opaque=[{self.path!r}]" if self.path else "")
        )


@dataclass(frozen=True)
class _OfModule:
    """The guards on the attributes of one module."""

    parts: tuple[str, ...]
    """Its path in the graph module, part by part."""
    plain: tuple[tuple[str, Any, Guard], ...] = ()
    """Attributes that are most easily looked at: name, value, and what to do about another one."""
    numbers: tuple[tuple[str, Guard], ...] = ()
    """Attributes that nodes read."""
    others: tuple[Guard, ...] = ()


@dataclass(frozen=True)
class Needed:
    """An attribute that a graph depends on."""

    path: str
    """Of the module, in the graph module."""
    names: tuple[str, ...]
    where: str
    is_read: bool
    """Whether the graph reads it anew, so that it has to be a number and no more."""
    values: tuple[Any, Any] | None = None
    """What it is in training and in evaluation, where that is not one value."""


def put_guards(graph_module: nn.Module, needed: Iterable[Needed], prefix: str = "") -> None:
    """Let a graph module check some attributes of its modules at every call.

    Args:
        graph_module: the module; what the attributes hold now is what they have to hold.
        needed: the attributes.
        prefix: path of the graph module in the whole model.
    """
    found: dict[str, list[Guard]] = {}
    seen: set[tuple[int, str]] = set()
    for need in needed:
        module = graph_module.get_submodule(need.path)
        holder = value_at(module, need.names[:-1])
        if (id(holder), need.names[-1]) in seen:  # of a config that many modules share
            continue
        seen.add((id(holder), need.names[-1]))
        now = value_at(module, need.names)
        pair = (now, now) if need.values is None else need.values
        expected = [IsNumber() if need.is_read else expectation_of(value) for value in pair]
        whole = joined_path(prefix, need.path)
        kind = type(module).__name__
        owner = f"module {whole!r} ({kind})" if whole else f"the model ({kind})"
        found.setdefault(need.path, []).append(Guard(need.names, owner, whole, need.where, *expected))
    table = tuple(
        _of_module(graph_module.get_submodule(path), path, guards) for path, guards in found.items()
    )
    vars(graph_module).pop(GUARDS, None)
    if table:
        vars(graph_module)[GUARDS] = table


def _of_module(module: nn.Module, path: str, guards: list[Guard]) -> _OfModule:
    plain, numbers, others = [], [], []
    for guard in guards:
        name, expected = guard.names[0], guard.in_training
        is_one_value = len(guard.names) == 1 and expected == guard.in_evaluation
        is_simple = isinstance(expected, IsEqual) and type(expected.value) in (bool, int, str, type(None))
        if is_one_value and is_simple and name in vars(module):
            plain.append((name, expected.value, guard))
        elif len(guard.names) == 1 and isinstance(guard.in_training, IsNumber):
            numbers.append((guard.names[0], guard))
        else:
            others.append(guard)
    return _OfModule(tuple(path.split(".")) if path else (), tuple(plain), tuple(numbers), tuple(others))


def refuse_changed_attributes(graph_module: nn.Module) -> None:
    """Refuse to run a graph that another value of an attribute would have made look otherwise.

    Raises:
        CaptureError: an attribute is not what it was when the graph was captured.
    """
    for guarded in vars(graph_module).get(GUARDS, ()):  # at every call of the model
        module: Any = graph_module
        for part in guarded.parts:
            module = module._modules.get(part)
            if module is None:  # taken out since, as what deployed models leave behind
                break
        if module is None:
            continue
        held = module.__dict__
        for name, value, guard in guarded.plain:
            if held.get(name, MISSING) is not value:
                guard.check(module)
        for name, guard in guarded.numbers:
            if type(held.get(name)) not in (float, int):
                guard.check(module)
        for guard in guarded.others:
            guard.check(module)


def value_at(module: Any, names: Iterable[str]) -> Any:
    """Return what attributes lead to, :data:`biofx.model.contents.MISSING` if they lead nowhere."""
    found = module
    for name in names:
        found = _attribute(found, name)
    return found


def _attribute(holder: Any, name: str) -> Any:
    if isinstance(holder, nn.Module) and type(holder).__getattr__ is nn.Module.__getattr__:
        for held in (holder.__dict__, holder._parameters, holder._buffers, holder._modules):
            if name in held:
                return held[name]
        if not hasattr(type(holder), name):
            return MISSING  # to ask the module takes ten times as long
    return getattr(holder, name, MISSING)
