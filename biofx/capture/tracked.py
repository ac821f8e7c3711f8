"""Values that remember the node they come from: sizes, types and numbers of modules, while a forward is
captured.

Sizes are ints and floats to whoever asks, types are ``torch.dtype``. What is computed from them becomes
nodes, so that a graph works at other sizes too, and in other types. A question that decides something (a
comparison, an index) makes the graph check, whenever it runs, that the answer is still the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.fx import Node

from biofx.graph.graph_functions import limit_of, type_from

Source = tuple[str, tuple[str, ...]]
"""Path of a module, and names of attributes, the first one's of the module: where a number was read."""


class Writer(Protocol):
    """Whose graph tracked values are part of."""

    @property
    def is_current(self) -> bool:
        """Whether what happens now belongs into this graph."""

    def auxiliary(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Write down a node that may go if nothing uses it."""

    def expect(self, function: Callable[..., Any], operands: tuple[Any, ...], found: Any) -> None:
        """Note that a question has its present answer wherever the graph is right."""


class _Tracked:
    """What all of them have in common."""

    frame: Writer
    make: Callable[[], Node]
    sources: frozenset[Source] = frozenset()
    """The attributes of modules that the value is computed from."""

    @property
    def node(self) -> Node:
        """The node that gives the value, made when first asked for."""
        found: Node | None = vars(self).get("_node")
        if found is None or getattr(found, "_erased", False):  # taken back meanwhile
            found = vars(self)["_node"] = self.make()
        return found

    @property
    def plain(self) -> Any:
        """The value alone."""
        return int.__int__(self) if isinstance(self, int) else float.__float__(self)  # type: ignore[arg-type]


class Size(_Tracked, int):
    """A whole number that remembers its node."""


class Real(_Tracked, float):
    """A real number that remembers its node."""


class _FromAttributes(_Tracked):
    """What numbers have in common that are computed from attributes of modules."""

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """Answer NumPy, whose functions decide by it as far as a graph can tell."""
        self._asked()
        return getattr(function, method)(*plain_inside(args), **plain_inside(kwargs))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        import numpy

        return numpy.asarray(self._asked(), *args, **kwargs)

    def __complex__(self) -> complex:
        return complex(self._asked())

    def __pos__(self) -> Any:
        return self

    def __hash__(self) -> int:
        return hash(self._asked())

    def __repr__(self) -> str:
        return repr(self._asked())

    def __format__(self, form: str) -> str:
        return format(self._asked(), form)

    def _asked(self) -> Any:
        """Return the number for a question of which nothing is known."""
        if self.frame.is_current:
            self.frame.expect(float, (self,), self.plain)
        return self.plain


class Number(_FromAttributes, Real):
    """A real number computed from attributes of modules, which remembers from which."""


class Whole(_FromAttributes, Size):
    """A whole number that an attribute of a module holds, on its way into arithmetic."""


_NO_TYPE = 127


class Type(_Tracked, bytearray):
    """The type of a tensor's entries (``torch.dtype``) that remembers its node.

    torch's classes of types cannot be derived from. Its functions take this one for what
    ``__torch_function__`` is defined for, and hand themselves over to that. The few that do not look for one
    read the number of a type from where a bytearray keeps its length: it is of no type, and so an error.
    """

    dtype: torch.dtype

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*plain_inside(args), **plain_inside(kwargs or {}))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return torch.dtype

    @property
    def plain(self) -> torch.dtype:
        """The type alone."""
        return self.dtype

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("dtype", "frame", "make"):
            raise AttributeError(name)
        found = getattr(self.dtype, name)
        frame = self.frame
        if not frame.is_current:
            return found
        if callable(found):  # to_real, to_complex
            return lambda: tracked(found(), frame, lambda: frame.auxiliary(type_from, (self.node, name)))
        if type(found) is int:
            return tracked(found, frame, lambda: frame.auxiliary(getattr, (self.node, name)))
        frame.expect(getattr, (self, name), found)
        return found

    def limit(self, name: str) -> Any:
        """Return a number of ``torch.finfo`` or ``torch.iinfo``, or another of their attributes."""
        found = limit_of(self.dtype, name)
        if not self.frame.is_current:
            return found
        if isinstance(found, (int, float)):
            return tracked(found, self.frame, lambda: self.frame.auxiliary(limit_of, (self.node, name)))
        self._asked()
        return found

    def _asked(self) -> torch.dtype:
        """Return the type for a question of which nothing is known: the graph works with this type only."""
        if self.frame.is_current:
            self.frame.expect(operator.eq, (self, self.dtype), True)
        return self.dtype

    def __eq__(self, other: object) -> bool:
        found = bool(self.dtype == plain(other))
        if self.frame.is_current and isinstance(other, torch.dtype):
            self.frame.expect(operator.eq, (self, other), found)
        return found

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self._asked())

    def __repr__(self) -> str:
        return repr(self._asked())

    __str__ = __repr__

    def __format__(self, form: str) -> str:
        return format(repr(self), form)

    def __bool__(self) -> bool:
        return True

    def __copy__(self) -> torch.dtype:
        return self.dtype

    def __deepcopy__(self, memo: Any) -> torch.dtype:
        return self.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (torch, str(self.dtype).rpartition(".")[2])


def tracked(
    value: Any, frame: Writer, make: Callable[[], Node], sources: frozenset[Source] = frozenset()
) -> Any:
    """Return a number or type that remembers where it comes from; anything else as it is."""
    made: Any
    if type(value) is torch.dtype:
        made = Type(_NO_TYPE)
        made.dtype = value
    elif sources and type(value) in (int, float):
        made = Number(value) if type(value) is float else Whole(value)
        made.sources = sources
    elif type(value) in (int, float):
        made = Size(value) if type(value) is int else Real(value)
    else:
        return value
    made.frame, made.make = frame, make
    return made


def plain(value: Any) -> Any:
    """Return a number or type without its memory, anything else as it is."""
    return value.plain if isinstance(value, _Tracked) else value


def plain_number(value: Any) -> Any:
    """Return a real number of NumPy's as one of Python's, which code can hold; anything else as it is."""
    is_numpys = isinstance(value, float) and type(value).__module__ == "numpy"
    return float(value) if is_numpys else value


def plain_inside(value: Any) -> Any:
    """Return the same with what lies in plain lists, tuples and dictionaries."""
    if type(value) in (tuple, list):
        return type(value)(plain_inside(entry) for entry in value)
    if type(value) is dict:
        return {key: plain_inside(entry) for key, entry in value.items()}
    return plain(value)


def sources_in(values: Any) -> frozenset[Source]:
    """Return the attributes of modules from which some values are computed."""
    found = [value.sources for value in values if isinstance(value, _Tracked)]
    return frozenset().union(*found)


def is_tracked_value(value: object) -> bool:
    """Whether a value remembers its node, of whatever graph."""
    return isinstance(value, _Tracked)


def is_tracked(value: object, frame: Writer | None) -> bool:
    """Whether a value is a number or type that comes from this frame."""
    return isinstance(value, _Tracked) and value.frame is frame


def _computes(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    def method(self: _Tracked, *others: Any) -> Any:
        if any(not isinstance(other, (int, float)) for other in others):
            if isinstance(self, Whole) and isinstance(others[0], (list, tuple, str, bytes)):
                self._asked()  # how often something is repeated
            return NotImplemented
        return computed(function, (*others[::-1], self) if swapped else (self, *others), self.frame)

    return method


def computed(function: Callable[..., Any], operands: tuple[Any, ...], frame: Writer) -> Any:
    """Return what a function makes of numbers, tracked in its turn where it can be."""
    found = function(*(plain(operand) for operand in operands))
    if not frame.is_current:
        return found
    sources = sources_in(operands)
    if sources and type(found) is not float:  # a whole number, which counts or names something
        asked = tuple(operand for operand in operands if sources_in((operand,)))
        frame.expect(function, asked, found)
        operands = tuple(plain(operand) if sources_in((operand,)) else operand for operand in operands)
        if not any(map(is_tracked_value, operands)):
            return found
        sources = frozenset()

    def make() -> Node:
        arguments = tuple(
            operand.node if is_tracked(operand, frame) else plain(operand) for operand in operands
        )
        return frame.auxiliary(function, arguments)

    return tracked(found, frame, make, sources)


def _decides(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Tracked, *others: Any) -> Any:
        if any(not isinstance(other, (int, float)) for other in others):
            return NotImplemented
        found = function(self.plain, *(plain(other) for other in others))
        if self.frame.is_current:
            self.frame.expect(function, (self, *others), found)
        return found

    return method


_COMPUTED = ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")
_ASKED = ("eq", "ne", "lt", "le", "gt", "ge")
for _class in (Size, Real):
    for _name in _COMPUTED:
        setattr(_class, f"__{_name}__", _computes(getattr(operator, _name)))
        setattr(_class, f"__r{_name}__", _computes(getattr(operator, _name), swapped=True))
    for _name in ("neg", "abs"):
        setattr(_class, f"__{_name}__", _computes(getattr(operator, _name)))
    for _name in _ASKED:
        setattr(_class, f"__{_name}__", _decides(getattr(operator, _name)))
    for _name, _function in (("bool", bool), ("int", int), ("float", float), ("index", operator.index)):
        setattr(_class, f"__{_name}__", _decides(_function))
    for _name, _answer in (
        ("hash", lambda self: hash(plain(self))),
        ("repr", lambda self: repr(plain(self))),
        ("reduce", lambda self: (type(plain(self)), (plain(self),))),
    ):
        setattr(_class, f"__{_name}__", _answer)
for _class, _kind in ((Number, float), (Whole, int)):
    for _name in ("round", "trunc", "floor", "ceil", "divmod", "rdivmod", "str"):
        setattr(_class, f"__{_name}__", _decides(getattr(_kind, f"__{_name}__")))
for _name in ("is_integer", "as_integer_ratio", "hex"):
    setattr(Number, _name, _decides(getattr(float, _name)))
