"""Observing a run: a graph of everything that Python computes on example inputs, for analysis alone.

Unlike a capture, an observed run need not compute the same thing at the next call. So nothing is refused:
what Python decides is taken as it was decided, loops are unrolled, and tensors are followed through
attributes, caches and containers, since they are told apart by identity.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.overrides import TorchFunctionMode

from biofx.capture.intercepted_calls import applications_handled, replaced
from biofx.capture.region_capture import is_leaf
from biofx.graph.graph_functions import AppliedFunction
from biofx.graph.observed_functions import SHAPE, made_elsewhere
from biofx.layers.attention import transformers_as_nodes
from biofx.layers.layer_kind import hooks_of
from biofx.model.observed_runs import INDICES
from biofx.static_inspection import is_of
from biofx.torch_private import pytree

_MOST_INDICES = 1 << 20
"""The largest index tensor whose values are kept, a count of entries."""


def observe_run(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], opaque: frozenset[str] = frozenset()
) -> Graph:
    """Run a model, and return the graph of what it computed.

    Args:
        root: a copy of the model, in the mode to observe.
        args: positional arguments.
        kwargs: keyword arguments.
        opaque: paths of modules that are one call each.

    Raises:
        Exception: whatever the model raises on these inputs.
    """
    return _RunObserver(root, opaque).observed(args, kwargs)


class _RunObserver(TorchFunctionMode):
    """Adds a node for each torch function, and for each layer of torch, that runs meanwhile."""

    def __init__(self, root: nn.Module, opaque: frozenset[str]) -> None:
        super().__init__()
        self._root = root
        self._opaque = opaque
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._stored = _tensors_held(root)
        self._nodes: dict[int, tuple[Node, Tensor]] = {}
        """The node that gives a tensor, and the tensor itself, so that its id stays its own."""
        self._stack: list[tuple[str, type]] = []
        self._is_quiet = False
        self.graph = Graph(tracer_cls=Tracer)

    def observed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Graph:
        for name, leaf in _named_leaves(self._root, args, kwargs):
            if isinstance(leaf, Tensor) and id(leaf) not in self._nodes:
                self._note(self.graph.create_node("placeholder", name, name=name), leaf)
        original: Any = nn.Module.__call__

        def call(module: nn.Module, *given: Any, **named: Any) -> Any:
            return self._call(module, original, given, named)

        with (
            replaced([(nn.Module, "__call__", call)]),
            applications_handled(self._apply, self._root.modules(), None),
            transformers_as_nodes(),
            self,
        ):
            found = original(self._root, *args, **kwargs)
        # a cache that is returned beside the results serves the next call, and is no readout
        leaves = [leaf for leaf in _tensors_in(found, objects=False) if id(leaf) in self._nodes]
        self.graph.output(tuple(self._nodes[id(leaf)][0] for leaf in leaves))
        return self.graph

    # what runs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._is_quiet:
            return func(*args, **kwargs)
        with self._quiet():
            name = getattr(func, "__name__", "")
            found = func(*args, **kwargs)
            if name == "__set__":
                self._forget(args[0])
            elif name == "__setitem__" or _holds_tensors(found):
                sources: Any = self._arguments_of(args, kwargs)
                target = _OPERATORS.get(name, func)
                if name in _REFLECTED:
                    target, sources = _REFLECTED[name], (sources[0][::-1], {})
                elif name == "__get__":
                    target, sources = getattr, ((sources[0][0], func.__self__.__name__), {})
                given = args, kwargs
                # what is written to is from now on what comes of it
                self._add("call_function", target, sources, given, args[0] if found is None else found)
        return found

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        before, self._is_quiet = self._is_quiet, True
        try:
            yield
        finally:
            self._is_quiet = before

    def _apply(self, original: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_quiet:
            return original(*args, **kwargs)
        if function.__name__ == "CheckpointFunction":  # which runs the forward of a module
            return original(*args, **kwargs)
        with self._quiet():
            found = original(*args, **kwargs)
            self._add(
                "call_function",
                AppliedFunction(function),
                self._arguments_of(args, kwargs),
                (args, kwargs),
                found,
            )
        return found

    def _call(self, module: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self._paths.get(id(module))
        if self._is_quiet or path is None:
            return original(module, *args, **kwargs)
        self._stack.append((path, type(module)))
        try:
            if not (is_leaf(module) or path in self._opaque):
                return original(module, *args, **kwargs)
            with self._quiet():
                sources = self._arguments_of(args, kwargs)
                found = original(module, *args, **kwargs)
                if not hooks_of(module):  # which may return something else
                    self._add("call_module", path, sources, (args, kwargs), found)
            return found
        finally:
            self._stack.pop()

    # nodes

    def _add(self, op: str, target: Any, sources: Any, given: Any, found: Any) -> None:
        """Add a node that gives a result, and note what is known of it besides the operation that made it."""
        node = self.graph.create_node(op, target, *sources)
        node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in self._stack}
        name = getattr(target, "__name__", "")
        if name in _BY_INDEX:
            node.meta[INDICES] = {
                self._nodes[id(leaf)][0].name: leaf.detach().clone()
                for leaf in _tensors_in(given)
                if not leaf.is_floating_point() and not leaf.is_meta and leaf.numel() <= _MOST_INDICES
            }
        self._take(node, found)

    def _take(self, node: Node, found: Any) -> None:
        """Let the tensors of a result be given by a node, or by entries of it."""
        if isinstance(found, Tensor):
            self._note(node, found)
        elif isinstance(found, dict):
            for key, entry in found.items():
                self._take_entry(node, key, entry)
        elif isinstance(found, (tuple, list)):
            for place, entry in enumerate(found):
                self._take_entry(node, place, entry)

    def _take_entry(self, node: Node, key: Any, entry: Any) -> None:
        if _tensors_in(entry):
            read = self.graph.create_node("call_function", operator.getitem, (node, key))
            read.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            if isinstance(entry, Tensor):
                read.meta[SHAPE] = tuple(entry.shape)
            self._take(read, entry)

    def _note(self, node: Node, tensor: Tensor) -> None:
        node.meta.setdefault(SHAPE, tuple(tensor.shape))
        self._nodes[id(tensor)] = node, tensor

    def _forget(self, tensor: Any) -> None:
        """Let a tensor whose content was exchanged be one that came from elsewhere."""
        self._nodes.pop(id(tensor), None)
        self._stored.pop(id(tensor), None)

    def _node_of(self, tensor: Tensor) -> Node:
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)][0]
        path = self._stored.get(id(tensor))
        if path is None:
            node = self.graph.create_node("call_function", made_elsewhere)
        else:
            node = self.graph.create_node("get_attr", path)
        self._note(node, tensor)
        return node

    def _arguments_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tuple(map(self._argument, args)), {name: self._argument(v) for name, v in kwargs.items()}

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, (tuple, list)):
            entries = [self._argument(entry) for entry in value]
            return entries if isinstance(value, list) else tuple(entries)
        if isinstance(value, slice):
            return slice(*map(self._argument, (value.start, value.stop, value.step)))
        if isinstance(value, Mapping):
            return {str(name): self._argument(entry) for name, entry in value.items()}
        plain = (bool, int, float, complex, str, torch.dtype, torch.device, type(None), type(...))
        return value if isinstance(value, plain) else None


_OPERATORS: dict[str, Any] = {
    f"__{name}__": getattr(operator, name)
    for name in str.split(
        """add sub mul truediv floordiv pow mod matmul neg abs getitem setitem
        iadd isub imul itruediv ifloordiv"""
    )
}
"""The function of ``operator`` for each method of a tensor behind it."""
_REFLECTED: dict[str, Any] = {
    "__rdiv__": operator.truediv,
    **{f"__r{name}__": getattr(operator, name) for name in str.split("sub truediv floordiv pow matmul")},
}
"""The same where the tensor is the second operand."""
_BY_INDEX = frozenset(
    str.split("getitem __getitem__ setitem index_select gather take_along_dim index_add index_add_ scatter")
)
"""Operations that move entries by the values of an index."""


def _holds_tensors(found: Any) -> bool:
    return isinstance(found, Tensor) or (isinstance(found, (tuple, list)) and bool(_tensors_in(found)))


def _tensors_in(value: Any, *, objects: bool = True) -> list[Tensor]:
    """Return the tensors in a value: in containers, and with ``objects`` in plain objects that hold them."""
    found: list[Tensor] = []
    seen: set[int] = set()
    pending = [value]
    while pending:
        entry = pending.pop()
        if id(entry) in seen:
            continue
        seen.add(id(entry))
        if isinstance(entry, Tensor):
            found.append(entry)
        elif isinstance(entry, Mapping):
            pending += reversed(list(entry.values()))
        elif isinstance(entry, (tuple, list)):
            pending += reversed(entry)
        elif dataclasses.is_dataclass(entry) and not isinstance(entry, type):
            pending += [getattr(entry, field.name) for field in reversed(dataclasses.fields(entry))]
        elif (
            objects
            and is_of(getattr(entry, "__dict__", None), dict)
            and not isinstance(entry, (nn.Module, type))
        ):
            pending += reversed(list(vars(entry).values()))
    return found


def _tensors_held(root: nn.Module) -> dict[int, str]:
    """Return the path of each tensor that a model holds: parameters, buffers and plain attributes."""
    held: dict[int, str] = {}
    for path, module in root.named_modules():
        groups = (module._parameters, module._buffers, vars(module))
        for name, value in (item for group in groups for item in group.items()):
            if is_of(value, Tensor):
                held.setdefault(id(value), f"{path}.{name}" if path else name)
    return held


def _named_leaves(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the entries of the arguments, with names made of those of the forward's parameters."""
    names = [*inspect.signature(root.forward).parameters, *(f"input_{place}" for place in range(len(args)))]
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        leaves = pytree.tree_leaves(value)
        for place, leaf in enumerate(leaves):
            yield (name if len(leaves) == 1 else f"{name}_{place}"), leaf
