"""Attributes that decided something while a forward was captured, and must not change afterwards.

A number that only flows into arithmetic is read by a node at every call. Other attributes that a forward
reads from its modules (flags, texts, counts, settings) have determined the graph, so every call checks that
they still have the values with which it was captured.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from biofx.errors import CaptureError
from biofx.graph.regions import joined_path

GUARDS = "_attribute_guards"
"""The attribute of a graph module that holds its guards."""


@dataclass(frozen=True)
class Guard:
    """The expected content of one attribute."""

    names: tuple[str, ...]
    """Names that lead to it: the first in the module, the next in the value of that."""
    owner: str
    """The module, as messages name it."""
    path: str
    """Path of the module in the whole model."""
    where: str
    """File and line that read the attribute."""
    in_training: Any
    """What is expected while the module is in training."""
    in_evaluation: Any
    """What is expected in evaluation."""

    def check(self, module: nn.Module) -> None:
        """Check the attribute of a module.

        Raises:
            CaptureError: it has changed.
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
            "and the graph depends on it. Set it back, or set it before the transform"
            + (f", or name the module in opaque=[{self.path!r}]" if self.path else "")
        )


@dataclass(frozen=True)
class _OfModule:
    """The guards of one module, sorted by how they are checked at every call."""

    parts: tuple[str, ...]
    """Its path in the graph module, part by part."""
    plain: tuple[tuple[str, Any, Guard], ...] = ()
    """Attributes that must be one object: its name and the object."""
    numbers: tuple[tuple[str, Guard], ...] = ()
    """Attributes that nodes read, and that must be numbers."""
    others: tuple[Guard, ...] = ()


@dataclass(frozen=True)
class Needed:
    """An attribute on which a graph depends."""

    path: str
    """Path of the module in the graph module."""
    names: tuple[str, ...]
    where: str
    is_read: bool
    """Whether a node reads it at every call, so that any number is accepted."""
    values: tuple[Any, Any] | None = None
    """Its values in training and in evaluation, None if there is one for both."""


def put_guards(graph_module: nn.Module, needed: Iterable[Needed], prefix: str = "") -> None:
    """Make a graph module check attributes of its modules at every call.

    Args:
        graph_module: the module; the present values of the attributes are the expected ones.
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
        is_own = len(guard.names) == 1
        value = vars(module).get(name, MISSING)
        is_simple = type(value) in (bool, int, str, type(None)) and expected.fits(value)
        if is_own and isinstance(expected, IsNumber):
            numbers.append((name, guard))
        elif is_own and is_simple and expected == guard.in_evaluation:
            plain.append((name, value, guard))
        else:
            others.append(guard)
    return _OfModule(tuple(path.split(".")) if path else (), tuple(plain), tuple(numbers), tuple(others))


def refuse_changed_attributes(graph_module: nn.Module) -> None:
    """Check the attributes on which a graph depends; called at every call of the model.

    Raises:
        CaptureError: an attribute has changed since the graph was captured.
    """
    for guarded in vars(graph_module).get(GUARDS, ()):
        module: Any = graph_module
        for part in guarded.parts:
            module = module._modules.get(part)
            if module is None:  # removed since, as by biofx.deploy
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
    """Return the value that names lead to, :data:`MISSING` if there is none."""
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
            return MISSING  # getattr would take ten times as long
    return getattr(holder, name, MISSING)


class _Missing:
    """The value of an attribute that does not exist."""

    def __repr__(self) -> str:
        return "nothing"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, tuple, set, deque)


@dataclass(frozen=True)
class IsNumber:
    """Accepts any number."""

    def fits(self, found: Any) -> bool:
        """Whether a value is accepted."""
        return isinstance(found, (int, float)) and not isinstance(found, bool)

    def __str__(self) -> str:
        return "a number"


@dataclass(frozen=True)
class HasContent:
    """Accepts values with a content, as :func:`_content_of` returns it."""

    content: Any

    def fits(self, found: Any) -> bool:
        """Whether a value is accepted."""
        return bool(_content_of(found, ()) == self.content)

    def __str__(self) -> str:
        return _text_of(self.content)


@dataclass(frozen=True, eq=False)
class _Same:
    """The content of a value without equality: the object itself."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def expectation_of(value: Any, *, follows: bool = True) -> HasContent:
    """Return what is expected of an attribute, given its present value.

    Args:
        value: the value.
        follows: whether an object whose reads are recorded one by one only needs to keep its class.
    """
    return HasContent(_content_of(value, () if follows else (0,)))


def _content_of(value: Any, around: tuple[int, ...]) -> Any:
    """Return type and content of a value in a form to compare; ``around`` has the ids of what holds it."""
    kind = type(value)
    if is_followed(value) and not around:
        return (kind,)
    has_content = isinstance(value, _CONTAINERS) or _is_object(value) or _is_array(value)
    if has_content and id(value) not in around and len(around) <= _DEEPEST:
        inside = (*around, id(value))
        return kind, tuple((key, _content_of(entry, inside)) for key, entry in _entries(value))
    if isinstance(value, _COMPARED):
        return kind, value if value == value else "nan"
    if kind is MethodType and isinstance(value.__self__, type):  # of which a copy is another object
        return kind, (("__self__", _Same(value.__self__)), ("__func__", _Same(value.__func__)))
    return _Same(value)


def _text_of(content: Any) -> str:
    if isinstance(content, _Same):
        return described(content.value)
    kind, *inside = content
    if not inside:
        return f"a {kind.__name__}"
    if not isinstance(inside[0], tuple):
        return described(inside[0])
    is_row = issubclass(kind, (list, tuple, set, deque))
    texts = (f"{'' if is_row else f'{key!r}: '}{_text_of(entry)}" for key, entry in inside[0])
    return f"a {kind.__name__} that holds {_shortened(', '.join(texts)) or 'nothing'}"


_COMPARED = (
    *(*_PLAIN, frozenset, range, slice),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Types whose values are compared by equality."""


def is_followed(value: Any) -> bool:
    """Whether reads from an object can be recorded one by one."""
    return (
        _is_object(value) and type(value) is not SimpleNamespace and not hasattr(type(value), "__getattr__")
    )


def _is_object(value: Any) -> bool:
    """Whether a value is an instance of a user's class, with attributes."""
    kind = type(value)
    home = kind.__module__.partition(".")[0]
    is_written_in_python = kind.__flags__ & _HEAP_TYPE and not kind.__flags__ & _IMMUTABLE_TYPE
    return kind is SimpleNamespace or (
        bool(is_written_in_python)
        and home not in ("torch", "biofx", "numpy", "functools", "random")
        and not isinstance(value, (type, Tensor, nn.Module, enum.Enum, *_COMPARED, *_CONTAINERS))
        and not callable(value)
    )


def fields_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by name, without running code of its class."""
    slots = (getattr(base, "__slots__", ()) for base in type(value).__mro__)
    names = [name for found in slots for name in ((found,) if isinstance(found, str) else found)]
    held: dict[str, Any] = {}
    for name in dict.fromkeys(("__dict__", *names)):
        try:
            found = object.__getattribute__(value, name)
        except AttributeError:
            continue
        held.update(found if name == "__dict__" else {name: found})
    return held


_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8
_DEEPEST = 5
"""Depth to which containers and objects are compared, a count."""


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from dict.items(value)
    elif isinstance(value, set):
        yield None, frozenset(value)
    elif isinstance(value, (list, tuple, deque)):
        yield from enumerate(value)
    elif _is_array(value):
        yield from (("shape", str(value.shape)), ("dtype", str(value.dtype)), ("values", value.tobytes()))
    else:
        yield from fields_of(value).items()


def _is_array(value: Any) -> bool:
    kind = type(value)
    return kind.__module__ == "numpy" and kind.__name__ == "ndarray"


def described(value: Any) -> str:
    """Return a value as text, a long one cut short."""
    if isinstance(value, (Tensor, nn.Module)):
        return f"a {type(value).__name__}"
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:76]} …"
