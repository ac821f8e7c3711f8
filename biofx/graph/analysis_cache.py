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
from collections.abc import Callable, Collection, Iterable, Iterator
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
        self.state = _State()
        self.found: dict[object, Any] = {}
        self.is_trusted = False
        """Whether an analysis is running, which does not change the graph."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Results, ()

    def forget(self) -> None:
        self.state = _State()
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
            if results.state.follow(graph_module):
                results.found.clear()
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
    """All that an analysis can see of a model, by identity."""

    def __init__(self) -> None:
        self._modules: dict[int, _ModuleState] = {}

    def follow(self, graph_module: GraphModule) -> bool:
        """Take over the present state of a model; return whether anything of it was not known."""
        found = {id(module): module for module in _modules_in(graph_module)}
        changed = [
            _ModuleState(module)
            for key, module in found.items()
            if key not in self._modules or not self._modules[key].holds()
        ]
        is_known = not changed and len(found) == len(self._modules)
        if not is_known:
            self._modules = {key: state for key, state in self._modules.items() if key in found}
            self._modules |= {id(state.module): state for state in changed}
        return not is_known


class _ModuleState:
    """What a module holds. It is held here, too, so that nothing takes its place with the same identity."""

    __slots__ = (
        *("_contents", "_empty", "_forms", "_kind", "_names", "_nodes", "_tensors", "_values", "module"),
    )

    def __init__(self, module: nn.Module) -> None:
        attributes = _attributes(module)
        self.module, self._kind = module, type(module)
        self._names, self._values = tuple(attributes), tuple(attributes.values())
        self._nodes = _nodes_of(module)
        held = (*module._parameters.values(), *module._buffers.values())
        self._tensors = [tensor for tensor in held if tensor is not None]
        self._forms = list(map(_form_of, self._tensors))
        self._empty: list[Any] = []
        self._contents: list[tuple[Any, tuple[object, ...]]] = []
        for value in self._values:
            if not is_of(value, (dict, list, set, SimpleNamespace)):
                continue
            content = tuple(_content(value))
            if not content and type(value) in (dict, OrderedDict):
                self._empty.append(value)
            else:
                self._contents.append((value, content))

    def holds(self) -> bool:
        """Whether it holds the same objects as it did, in the same places."""
        module, attributes = self.module, _attributes(self.module)
        return (
            type(module) is self._kind
            and tuple(attributes) == self._names
            and all(map(is_, attributes.values(), self._values))
            and not any(self._empty)
            and all(_are_same(_content(value), content) for value, content in self._contents)
            and list(map(_form_of, self._tensors)) == self._forms
            and _are_same(_nodes_of(module), self._nodes)
        )


def _are_same(now: Collection[object], before: Collection[object]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _attributes(module: nn.Module) -> dict[str, Any]:
    attributes = vars(module)
    if not isinstance(module, GraphModule):
        return attributes
    return {name: value for name, value in attributes.items() if name not in _GENERATED}


def _form_of(tensor: Any) -> object:
    """Return what may change of a tensor that stays the same object, but for its values."""
    if not isinstance(tensor, Tensor):
        return None
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _nodes_of(module: nn.Module) -> list[object]:
    found: list[object] = []
    for node in module.graph.nodes if isinstance(module, GraphModule) else ():
        stack = node.meta.get("nn_module_stack")
        found += (node, node.name, node.op, node.target, node.args, node.kwargs, stack)
    return found


def _modules_in(root: nn.Module) -> Iterable[nn.Module]:
    """Return the modules of a model, itself among them; no method of a user's class is run."""
    found: dict[int, nn.Module] = {}
    left = [root]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            left += [inner for inner in vars(module)["_modules"].values() if inner is not None]
    return found.values()


def _content(container: Any) -> Collection[object]:
    """Return what is in a container; no method of a user's class is run."""
    kind = type(container)
    if kind is list or kind is set:
        return container  # type: ignore[no-any-return]
    if kind is dict or kind is OrderedDict:
        return (*container, *container.values())
    if kind is SimpleNamespace:
        return (*vars(container), *vars(container).values())
    content = content_of(container)
    return [part for item in content for part in item] if is_of(container, dict) else content
