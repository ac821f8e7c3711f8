"""Numbers and types that remember the node they come from: sizes, dtypes and attributes of modules.

A :class:`SymInt` is an int, a :class:`SymFloat` a float, and a :class:`SymDtype` passes for a
``torch.dtype``. What is computed from them becomes nodes, so that a graph works at other sizes, too, and in
other types. Where one of them decides something (a comparison, an index), the graph checks at each call that
it decides the same.

The symbolic numbers of torch (``torch.SymInt``) need fake tensors and a shape environment; here real tensors
flow.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol

import torch
from torch.fx import Graph, Node

from biofx.graph.graph_functions import limit_of, type_from
from biofx.torch_private import is_erased, pytree

Source = tuple[str, tuple[str, ...]]
"""Path of a module, and names of attributes, the first one the module's: where a number was read."""


class Builder(Protocol):
    """What both tracers do to the graph under construction."""

    @property
    def graph(self) -> Graph:
        """The graph so far."""

    @property
    def is_current(self) -> bool:
        """Whether what happens now belongs to this graph."""

    def write(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Add a call of a function."""

    def auxiliary(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Add a call of a function that is removed if nothing uses it."""

    def attribute_node(self, target: str) -> Node:
        """Return the node that reads an attribute."""

    def expect(self, function: Callable[..., Any], operands: tuple[Any, ...], found: Any) -> None:
        """Let the graph check that a function of some values returns what it has returned now."""

    def stop(self, what: str) -> NoReturn:
        """Break the graph at the running line."""


class _Symbolic:
    builder: Builder
    make: Callable[[], Node]
    sources: frozenset[Source] = frozenset()
    """The attributes of modules that the value is computed from."""

    @property
    def node(self) -> Node:
        """The node that gives the value, made when first asked for."""
        found: Node | None = vars(self).get("_node")
        if found is None or is_erased(found):  # by a graph break
            found = vars(self)["_node"] = self.make()
        return found

    @property
    def plain(self) -> Any:
        """The value alone."""
        return int.__int__(self) if isinstance(self, int) else float.__float__(self)  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return hash(self.plain)

    def __repr__(self) -> str:
        return repr(self.plain)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self.plain), (self.plain,)


class SymInt(_Symbolic, int):
    """An int that remembers its node."""


class SymFloat(_Symbolic, float):
    """A float that remembers its node."""


class _OfAttributes(_Symbolic):
    """A number that is computed from attributes of modules. Conversions of it are decisions."""

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        self._decided()
        return getattr(function, method)(*plain_inside(args), **plain_inside(kwargs))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        import numpy

        return numpy.asarray(self._decided(), *args, **kwargs)

    def __complex__(self) -> complex:
        return complex(self._decided())

    def __pos__(self) -> Any:
        return self

    def __hash__(self) -> int:
        return hash(self._decided())

    def __repr__(self) -> str:
        return repr(self._decided())

    def __format__(self, form: str) -> str:
        return format(self._decided(), form)

    def _decided(self) -> Any:
        """Return the number, which is used in a way that is not known to be arithmetic."""
        if self.builder.is_current:
            self.builder.expect(float, (self,), self.plain)
        return self.plain


class AttributeFloat(_OfAttributes, SymFloat):
    """A float that is computed from attributes of modules."""


class AttributeInt(_OfAttributes, SymInt):
    """An int that an attribute of a module holds, on its way into arithmetic."""


_NO_TYPE = 127


class SymDtype(_Symbolic, bytearray):
    """A ``torch.dtype`` that remembers its node.

    ``torch.dtype`` cannot be derived from. torch's functions accept any class with a ``__torch_function__``
    in its place, and call that. The few that do not read the number of a type from where a bytearray keeps
    its length: that is no type's, and so an error.
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
        if name.startswith("_") or name in ("dtype", "builder", "make"):
            raise AttributeError(name)
        found = getattr(self.dtype, name)
        builder = self.builder
        if not builder.is_current:
            return found
        if callable(found):  # to_real, to_complex
            return lambda: symbolic(found(), builder, lambda: builder.auxiliary(type_from, (self.node, name)))
        if type(found) is int:
            return symbolic(found, builder, lambda: builder.auxiliary(getattr, (self.node, name)))
        builder.expect(getattr, (self, name), found)
        return found

    def limit(self, name: str) -> Any:
        """Return an attribute of the type's ``torch.finfo`` or ``torch.iinfo``."""
        found = limit_of(self.dtype, name)
        if not self.builder.is_current:
            return found
        if isinstance(found, (int, float)):
            return symbolic(found, self.builder, lambda: self.builder.auxiliary(limit_of, (self.node, name)))
        self._decided()
        return found

    def _decided(self) -> torch.dtype:
        """Return the type, which is used in a way that only this type is known to be right for."""
        if self.builder.is_current:
            self.builder.expect(operator.eq, (self, self.dtype), True)
        return self.dtype

    def __eq__(self, other: object) -> bool:
        found = bool(self.dtype == plain(other))
        if self.builder.is_current and isinstance(other, torch.dtype):
            self.builder.expect(operator.eq, (self, other), found)
        return found

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self._decided())

    def __repr__(self) -> str:
        return repr(self._decided())

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


def symbolic(
    value: Any, builder: Builder, make: Callable[[], Node], sources: frozenset[Source] = frozenset()
) -> Any:
    """Return a number or type that remembers its node; anything else as it is.

    Args:
        value: the number or type.
        builder: of the graph that the node is in.
        make: adds the node, when it is first needed.
        sources: the attributes of modules that the value is computed from.
    """
    made: Any
    if type(value) is torch.dtype:
        made = SymDtype(_NO_TYPE)
        made.dtype = value
    elif type(value) is int:
        made = AttributeInt(value) if sources else SymInt(value)
    elif type(value) is float:
        made = AttributeFloat(value) if sources else SymFloat(value)
    else:
        return value
    made.builder, made.make = builder, make
    if sources:
        made.sources = sources
    return made


def plain(value: Any) -> Any:
    """Return a symbolic number or type as a plain one, anything else as it is."""
    return value.plain if isinstance(value, _Symbolic) else value


def plain_number(value: Any) -> Any:
    """Return a float of NumPy's as one of Python's, which code can hold; anything else as it is."""
    is_numpys = isinstance(value, float) and type(value).__module__ == "numpy"
    return float(value) if is_numpys else value


def plain_inside(value: Any) -> Any:
    """Return a value with plain numbers and types in it, inside tuples, lists and dicts, too."""
    return pytree.tree_map(plain, value, is_leaf=lambda inner: type(inner) not in (tuple, list, dict))


def sources_in(values: Iterable[Any]) -> frozenset[Source]:
    """Return the attributes of modules from which some values are computed."""
    return frozenset().union(*(value.sources for value in values if isinstance(value, _Symbolic)))


def is_symbolic(value: object, builder: Builder | None = None) -> bool:
    """Whether a value is a symbolic number or type, of one graph or of any."""
    return isinstance(value, _Symbolic) and (builder is None or value.builder is builder)


def computed(function: Callable[..., Any], operands: tuple[Any, ...], builder: Builder) -> Any:
    """Return what a function computes from numbers, symbolic itself where it can be."""
    found = function(*map(plain, operands))
    if not builder.is_current:
        return found
    sources = sources_in(operands)
    if sources and type(found) is not float:  # a whole number, which counts or names something
        builder.expect(function, tuple(operand for operand in operands if sources_in((operand,))), found)
        operands = tuple(plain(operand) if sources_in((operand,)) else operand for operand in operands)
        if not any(map(is_symbolic, operands)):
            return found
        sources = frozenset()

    def make() -> Node:
        return builder.auxiliary(
            function, tuple(o.node if is_symbolic(o, builder) else plain(o) for o in operands)
        )

    return symbolic(found, builder, make, sources)


# the methods of the numbers, by what they do with the node


def _computes(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    def method(self: _Symbolic, *others: Any) -> Any:
        if any(not isinstance(other, (int, float)) for other in others):
            if isinstance(self, AttributeInt) and isinstance(others[0], (list, tuple, str, bytes)):
                self._decided()  # how often something is repeated
            return NotImplemented
        return computed(function, (*others[::-1], self) if swapped else (self, *others), self.builder)

    return method


def _decides(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Symbolic, *others: Any) -> Any:
        if any(not isinstance(other, (int, float)) for other in others):
            return NotImplemented
        found = function(self.plain, *map(plain, others))
        if self.builder.is_current:
            self.builder.expect(function, (self, *others), found)
        return found

    return method


def _add_methods() -> None:
    for kind in (SymInt, SymFloat):
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "abs"):
            setattr(kind, f"__{name}__", _computes(getattr(operator, name)))
            if name not in ("neg", "abs"):
                setattr(kind, f"__r{name}__", _computes(getattr(operator, name), swapped=True))
        for name in ("eq", "ne", "lt", "le", "gt", "ge", "index"):
            setattr(kind, f"__{name}__", _decides(getattr(operator, name)))
        for rounded in (round, math.trunc, math.floor, math.ceil):
            setattr(kind, f"__{rounded.__name__}__", _computes(rounded))
        for converted in (bool, int, float):
            setattr(kind, f"__{converted.__name__}__", _decides(converted))
    for name in ("round", "trunc", "floor", "ceil", "divmod", "rdivmod", "str"):
        setattr(AttributeFloat, f"__{name}__", _decides(getattr(float, f"__{name}__")))
        setattr(AttributeInt, f"__{name}__", _decides(getattr(int, f"__{name}__")))
    for name in ("is_integer", "as_integer_ratio", "hex"):
        setattr(AttributeFloat, name, _decides(getattr(float, name)))


_add_methods()
