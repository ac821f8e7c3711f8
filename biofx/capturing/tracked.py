"""Numbers that remember the node they come from: sizes of tensors, while a forward is recorded.

They are ints and floats to whoever asks. What is computed from them becomes nodes, so that a graph works at
other sizes too. A question that decides something (a comparison, an index) makes the graph check, whenever
it runs, that the answer is still the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.fx import Node

if TYPE_CHECKING:
    from biofx.capturing.frames import Frame


class _Tracked:
    """What both kinds of numbers have in common."""

    frame: Frame
    make: Callable[[], Node]

    @property
    def node(self) -> Node:
        """The node that gives the number, made when first asked for."""
        if "_node" not in vars(self):
            vars(self)["_node"] = self.make()
        found: Node = vars(self)["_node"]
        return found

    @property
    def plain(self) -> Any:
        """The number alone."""
        return int.__int__(self) if isinstance(self, int) else float.__float__(self)  # type: ignore[arg-type]


class Size(_Tracked, int):
    """A whole number that remembers its node."""


class Real(_Tracked, float):
    """A real number that remembers its node."""


def tracked(value: Any, frame: Frame, make: Callable[[], Node]) -> Any:
    """Return a number that remembers where it comes from; anything else as it is."""
    if type(value) not in (int, float):
        return value
    number: Any = Size(value) if type(value) is int else Real(value)
    number.frame, number.make = frame, make
    return number


def plain(value: Any) -> Any:
    """Return a number without its memory, anything else as it is."""
    return value.plain if isinstance(value, _Tracked) else value


def is_tracked(value: object, frame: Frame | None) -> bool:
    """Whether a value is a number of this frame's."""
    return isinstance(value, _Tracked) and value.frame is frame


def _computes(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    def method(self: _Tracked, *others: Any) -> Any:
        if any(not isinstance(other, (int, float)) for other in others):
            return NotImplemented
        operands = (*others[::-1], self) if swapped else (self, *others)
        found = function(*(plain(operand) for operand in operands))
        frame = self.frame
        if not frame.is_current:
            return found

        def make() -> Node:
            arguments = tuple(
                operand.node if is_tracked(operand, frame) else plain(operand) for operand in operands
            )
            return frame.auxiliary(function, arguments)

        return tracked(found, frame, make)

    return method


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
