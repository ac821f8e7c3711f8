"""The forward walk that analyses share, and the table of rules: what each operation makes of its arguments.

An analysis says what can be known of a value: :mod:`biofx.analysis.units` whose activity it holds,
:mod:`biofx.analysis.replication` whether its channels are repeated. A rule says what an operation makes of
that. The rules are in the ``rules_*.py`` files beside this one, one entry for each operation, with its rules
for both analyses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from biofx.graph.modules_by_path import modules_by_path
from biofx.torch_private import MODULE_OF_TENSOR_METHODS

ValueT = TypeVar("ValueT")


class CannotFollow(Exception):  # noqa: N818
    """Says why an analysis cannot follow values through an operation; rules raise it."""


@dataclass(frozen=True)
class Entry:
    """The rules of one operation; None where an analysis has none for it."""

    units: Callable[[Any], Any] | None = None
    replication: Callable[[Any], Any] | None = None


TABLE: dict[Any, Entry] = {}
"""The entry of each operation: by function, by name for a method, by class for a module."""
_MODULES = {name.lower(): cls for name, cls in vars(nn).items() if isinstance(cls, type)}


def declare(
    *operations: Any,
    units: Callable[[Any], Any] | None = None,
    replication: Callable[[Any], Any] | None = None,
) -> None:
    """Enter the rules of operations that behave alike.

    Args:
        operations: a name is all that torch calls so: functions of ``torch`` and ``torch.nn.functional``,
            the tensor method, their forms that work in place, and the module class. Anything else is a
            function or a class itself.
        units: takes a :class:`~biofx.analysis.units.UnitCall`.
        replication: takes a :class:`~biofx.analysis.replication.ReplicationCall`.
    """
    for operation in operations:
        for target in _spellings(operation) if isinstance(operation, str) else (operation,):
            entry = TABLE.get(target, Entry())
            TABLE[target] = Entry(units or entry.units, replication or entry.replication)


def _spellings(name: str) -> Iterator[Any]:
    for spelled in (name, f"{name}_"):
        yield from (getattr(place, spelled) for place in (torch, F) if hasattr(place, spelled))
        if hasattr(Tensor, spelled):
            yield spelled
    module = _MODULES.get(name.replace("_", ""))
    if module is not None:
        yield module


def rule_for(analysis: str, node: Node, module: nn.Module | None) -> Callable[[Any], Any] | None:
    """Return the rule that an analysis has for a node, None if it has none.

    Args:
        analysis: ``"units"`` or ``"replication"``.
        node: a call.
        module: what a ``call_module`` node calls; the rule of its class or of the nearest base holds.
    """
    target: Any = node.target
    name = getattr(target, "__name__", "")
    is_wrapped = getattr(target, "__module__", "") == MODULE_OF_TENSOR_METHODS  # as that of **
    if is_wrapped or getattr(Tensor, name, None) is target:  # a method, called as a function
        target = name
    targets = (target,) if module is None else type(module).__mro__
    rules = (getattr(TABLE[key], analysis) for key in targets if key in TABLE)
    return next((rule for rule in rules if rule is not None), None)


class Call:
    """One operation in a graph, as a rule sees it."""

    def __init__(self, node: Node, module: nn.Module | None) -> None:
        self.node = node
        self.module: Any = module
        """The module that a ``call_module`` node calls, None for functions and methods."""

    @property
    def name(self) -> str:
        """Name of the function, method or module class."""
        if self.module is not None:
            return type(self.module).__name__
        return str(getattr(self.node.target, "__name__", self.node.target))

    @property
    def first(self) -> Any:
        """The first argument as it stands in the graph."""
        return self.node.args[0] if self.node.args else next(iter(self.node.kwargs.values()), None)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument as it stands in the graph: a node, a constant, or a list of those."""
        if len(self.node.args) > place:
            return self.node.args[place]
        return self.node.kwargs.get(name, default)

    def option(self, place: int, name: str, default: Any = None) -> Any:
        """Return an option: an attribute of the module, or an argument of the function."""
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.argument(place, name, default)

    def listed(self, place: int, name: str) -> Any:
        """Return arguments that may be given one by one or as a list."""
        first = self.argument(place, name)
        return first if isinstance(first, (list, tuple)) else self.node.args[place:]


class ForwardAnalysis(ABC, Generic[ValueT]):
    """A walk over a graph in the order of execution, which finds out something of each value."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.values: dict[Node, ValueT] = {}
        """What is known of the value of each node."""
        self.ended: dict[Node, str] = {}
        """The nodes through which values could not be followed, and why."""
        self._modules = modules_by_path(graph_module)

    def walk(self) -> None:
        """Find out what is known of each value."""
        for node in self.graph_module.graph.nodes:
            try:
                value = self.value_of(node)
            except CannotFollow as end:
                value = self.end(node, str(end))
            if value is not None:
                self.values[node] = value

    @abstractmethod
    def value_of(self, node: Node) -> ValueT | None:
        """Return what is known of a node's value, None if there is nothing to say.

        Raises:
            CannotFollow: the operation ends what was known of its arguments.
        """

    def end(self, node: Node, reason: str) -> ValueT | None:
        """Note that nothing is followed through a node; return what is known of its value."""
        self.ended[node] = reason
        return None

    def module_of(self, node: Node) -> nn.Module | None:
        """Return the module that a node calls, None for functions and methods."""
        return self._modules[str(node.target)] if node.op == "call_module" else None
