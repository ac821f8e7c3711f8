"""Results of analyses, kept on the graph they were made of until that graph or its model changes.

An analysis is a function of a graph module that only looks at it. Decorated with :func:`cached_on_graph`, it
runs once for each state of the model while analyses are kept: for the time of a rewrite
(:func:`analyses_kept`), or of one analysis that calls others. Afterwards nothing is kept: results hold
weights, and a model whose weights are replaced would keep the old ones in memory.

Changes need not be reported. torch.fx has no version number for graphs, and its hooks miss assignments to
``node.args``, so each query compares what an analysis can see with what there was when the results were made:
nodes and their immutable arguments, modules and what they hold, and the graphs of regions. Where nothing is
rewritten between queries (:func:`unchanged`), the first of them compares for all.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import is_
from types import SimpleNamespace
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import GraphModule

from biofx.static_inspection import content_of, is_of

ResultT = TypeVar("ResultT")
ModuleT = TypeVar("ModuleT", bound=GraphModule)

_PLACE = "_biofx_analyses"
"""The attribute of a graph that holds its results."""
_GENERATED = frozenset({"_code", "_lineno_map", "_prologue_start", "_graph", "_replace_hooks"})
"""Attributes of a graph module that are made from its graph, which is compared by itself."""


class _Results:
    """What was found out about one state of a model; copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.state: _State | None = None
        self.found: dict[object, Any] = {}
        self.is_trusted = False
        """Whether an analysis is running, which does not change the graph."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Results, ()

    def forget(self) -> None:
        self.state = None
        self.found.clear()


class _Scope:
    """A time in which results are kept."""

    def __init__(self, *, may_change: bool) -> None:
        self.may_change = may_change
        self.results: weakref.WeakSet[_Results] = weakref.WeakSet()
        self.compared: dict[_Results, GraphModule] | None = None
        """For which model results were compared since nothing changes; None while models may change."""

    def forget(self) -> None:
        for results in self.results:
            results.forget()


_scope: ContextVar[_Scope | None] = ContextVar("_scope", default=None)


@contextmanager
def analyses_kept(*, may_change: bool = True) -> Iterator[None]:
    """Keep the results of analyses until the end of the block; within another such block, until its end.

    Args:
        may_change: whether models may change within the block; if not, queries do not look for changes.
    """
    if _scope.get() is not None:
        yield
        return
    scope = _Scope(may_change=may_change)
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)
        scope.forget()


@contextmanager
def unchanged() -> Iterator[None]:
    """Compare each model at the first query within the block alone: until its end, nobody changes it."""
    scope = _scope.get()
    if scope is None or scope.compared is not None:
        yield
        return
    scope.compared = {}
    try:
        yield
    finally:
        scope.compared = None


def forget_analyses() -> None:
    """Drop all results that are kept, since an analysis now works in another way."""
    if (scope := _scope.get()) is not None:
        scope.forget()


def cached_on_graph(analysis: Callable[[ModuleT], ResultT]) -> Callable[[ModuleT], ResultT]:
    """Let a function of a graph module run once for each state of the module, while analyses are kept.

    Callers share the result and must not change it.
    """

    @functools.wraps(analysis)
    def cached(graph_module: ModuleT) -> ResultT:
        scope = _scope.get()
        if scope is None:
            with analyses_kept(may_change=False):
                return cached(graph_module)
        results: _Results = vars(graph_module.graph).setdefault(_PLACE, _Results())
        scope.results.add(results)
        compared = scope.compared
        is_compared = results.is_trusted or (compared is not None and compared.get(results) is graph_module)
        if scope.may_change and not is_compared:
            if compared is not None:
                compared[results] = graph_module
            state = _State(graph_module)
            if results.state is None or not results.state.is_same(state):
                results.forget()
                results.state = state
        if analysis not in results.found:
            was_trusted, results.is_trusted = results.is_trusted, True
            try:
                results.found[analysis] = analysis(graph_module)
            finally:
                results.is_trusted = was_trusted
        found: ResultT = results.found[analysis]
        return found

    return cached


class _State:
    """All that an analysis can see of a model, by identity.

    The objects are held, so that none of them can make room for another with the same identity.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._objects: list[object] = []
        self._tensors: list[object] = []
        """Shapes and the like, which change in place."""
        for module in graph_module.modules():
            self._note_module(module)

    def is_same(self, other: _State) -> bool:
        """Whether two states hold the same objects in the same places."""
        return (
            len(self._objects) == len(other._objects)
            and all(map(is_, self._objects, other._objects))
            and self._tensors == other._tensors
        )

    def _note_module(self, module: nn.Module) -> None:
        objects, attributes = self._objects, vars(module)
        objects += (module, type(module))
        if isinstance(module, GraphModule):
            attributes = {name: value for name, value in attributes.items() if name not in _GENERATED}
            for node in module.graph.nodes:
                stack = node.meta.get("nn_module_stack")
                objects += (node, node.name, node.op, node.target, node.args, node.kwargs, stack)
        objects += attributes
        for value in attributes.values():
            objects.append(value)  # ahead of its content, which shows where containers begin
            objects += _content(value)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, Tensor):
                self._tensors.append((tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad))


def _content(value: Any) -> Iterable[object]:
    """Return what is in a container, nothing for anything else; no method of a user's class is run."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is int or kind is float or kind is tuple:
        return ()  # most of what modules hold, and quicker here
    if kind is list or kind is set:
        return value  # type: ignore[no-any-return]
    if kind is dict or kind is OrderedDict:
        return (*value, *value.values()) if value else ()
    if kind is SimpleNamespace:
        return _content(vars(value))
    if is_of(value, (dict, list, set)):
        content = content_of(value)
        return [part for item in content for part in item] if is_of(value, dict) else content
    return ()
