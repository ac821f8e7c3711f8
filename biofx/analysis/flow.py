"""What the analysis knows of a value, and what a rule is given to work with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.fx import Node

from biofx.analysis.layout import Axis, Layout, LayoutError

if TYPE_CHECKING:
    from biofx.analysis.analysis import Analysis


@dataclass(frozen=True)
class Flow:
    """What is known of one value."""

    layout: Layout | None = None
    """Where its units are; None where it has none, or where that is open."""
    origin: Node | None = None
    """The node whose output holds its units, where nothing tells along which axis: the model's input, or
    the result of an operation that no rule knows."""
    rank: int | None = None
    """Number of its axes with a batch axis, where known."""
    nonnegative: bool = False
    """Whether none of its entries can be negative."""
    parts: tuple[Flow, ...] | None = None
    """Of a tuple or list, its entries."""
    tail: tuple[Flow, ...] | None = None
    """Of a tuple of unknown length, what is known of its last entries."""
    number: int | None = None
    """Of a whole number that the graph computes from sizes, its value."""
    size_of: int | None = None
    """Of the size of an axis 1, of a product of sizes how many axes it is the size of; None for all else."""

    @property
    def has_units(self) -> bool:
        """Whether it carries the activity of units."""
        return self.layout is not None or self.origin is not None

    def replace(self, **changes: Any) -> Flow:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


NOTHING = Flow()
"""What parameters, sizes and flags carry."""


class Call:
    """One operation in a graph, as a rule sees it."""

    def __init__(self, node: Node, module: nn.Module | None, analysis: Analysis) -> None:
        self.node = node
        self.module: Any = module
        """The module that a ``call_module`` node calls, None for functions and methods."""
        self._analysis = analysis

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument as it stands in the graph: a node, a constant, or a list of those."""
        if len(self.node.args) > place:
            return self.node.args[place]
        return self.node.kwargs.get(name, default)

    def flow(self, argument: Any) -> Flow:
        """Return what is known of an argument."""
        if isinstance(argument, Node):
            return self._analysis.flows[argument]
        if isinstance(argument, (list, tuple)):
            return Flow(parts=tuple(self.flow(entry) for entry in argument))
        if isinstance(argument, int) and not isinstance(argument, bool):
            return Flow(number=argument, nonnegative=argument >= 0)
        return Flow(nonnegative=isinstance(argument, float) and argument >= 0)

    @property
    def x(self) -> Flow:
        """What is known of the first argument."""
        first = self.node.args[0] if self.node.args else next(iter(self.node.kwargs.values()), None)
        return self.flow(first)

    def numbers(self, arguments: Sequence[Any]) -> list[int | None]:
        """Return the whole numbers that arguments hold, None for each that is not known."""
        return [self.flow(argument).number for argument in arguments]

    def position(self, axis: Any, flow: Flow | None = None, *, added: int = 0) -> int:
        """Return an axis of the first argument (or of ``flow``) counted from the end.

        Args:
            axis: as given to the operation.
            flow: whose axis it is.
            added: how many axes more the result has, where ``axis`` is one of the result.

        Raises:
            LayoutError: it is counted from the front of a value whose rank is not known.
        """
        number = self.flow(axis).number
        rank = (self.x if flow is None else flow).rank
        if number is None:
            raise LayoutError("an axis is computed in the graph")
        if number < 0:
            return number
        if rank is None:
            raise LayoutError(f"axis {number} is counted from the front, and the number of axes is not known")
        return number - rank - added

    def ends(self, reason: str) -> Flow:
        """Say that the units of the arguments end here; those of the result are new."""
        return self._analysis.end(self.node, reason)

    def keeps(self, flow: Flow | None = None, **changes: Any) -> Flow:
        """Return that the result has the units of the first argument (or of ``flow``) where they were."""
        kept = self.x if flow is None else flow
        return kept.replace(number=None, parts=None, tail=None, size_of=None, **changes)

    def unified(self, flows: Sequence[Flow]) -> Flow:
        """Return the flow of a result whose units are those of several values, one by one.

        Values without units, and those of one entry where the others have many, count for nothing.
        """
        return self._analysis.unify(self.node, [flow for flow in flows if flow.has_units])

    def compares(self, *operands: Any) -> None:
        """Say that arguments are only compared with each other (queries and keys), not passed on."""
        self._analysis.note_comparison(self.node, operands)

    def unify_rows(self, table: Tensor) -> None:
        """Make all units of each row of a ``(rows, units)`` table one."""
        self._analysis.unify_rows(table)

    def known_layout(self, flow: Flow, axes: tuple[Axis, ...]) -> Layout | None:
        """Return the layout along ``axes`` of a flow that left it open and has been read so before."""
        return self._analysis.known_layout(flow, axes)

    def nobody(self, count: int) -> Tensor:
        """Return units that stand for constants, ``(count,)``."""
        return self._analysis.nobody(count)

    def normalises(self) -> None:
        """Say that the operation is a normalisation, whose gain may be negative."""
        self._analysis.norms[self.node] = self.x

    def moves_unknown(self, **changes: Any) -> Flow:
        """Return that the result has units where the argument has, and where is as open as before."""
        return self._analysis.moved_unknown(self.node, self.x).replace(**changes)


Rule: TypeAlias = Callable[[Call], Flow]
"""Says where the units of an operation's result are, given where those of its arguments are."""

RULES: dict[Any, Rule] = {}
"""The rule of each operation: by function, by name for a method, by class for a module."""


def add_unit_rule(target: Callable[..., Any] | str | type[nn.Module], rule: Rule) -> None:
    """Teach the unit analysis an operation; a rule that there is already gives way.

    Args:
        target: a function, the name of a tensor method, or a module class whose calls are nodes of the graph.
        rule: takes a :class:`Call` and returns a :class:`Flow`. Most rules are one line:
            ``lambda call: call.keeps()`` for what leaves every unit where it is.

    >>> import torch, biofx
    >>> biofx.add_unit_rule(torch.erf, lambda call: call.keeps(nonnegative=False))
    """
    RULES[target] = rule


def rule_for(node: Node, module: nn.Module | None) -> Rule | None:
    """Return the rule for a node, None if there is none."""
    if module is not None:
        return next((RULES[cls] for cls in type(module).__mro__ if cls in RULES), None)
    return RULES.get(node.target)
