"""Trying a recorded model against the model: at other sizes, in both modes, in other types."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from biofx.capture.graph_breaks import GraphBreak
from biofx.capture.region_capture import is_leaf
from biofx.capture.variants import Axis, axes_of, is_of_samples, sizes_asked_about
from biofx.graph.branches import by_mode
from biofx.graph.contexts import steers_gradients
from biofx.graph.graph_functions import AppliedFunction, has_checkpoints
from biofx.graph.guards import RecordingError, require_same
from biofx.layers.transformer_layers import plain_paths
from biofx.model.copies import deep_copy
from biofx.model.modes import switch_mode


class Trials:
    """Runs of a model and of what was made of it, on copies.

    Args:
        root: the model.
        given: the example, positional and keyword arguments.
        copy: makes a copy of either that has these.
        borrow: returns such a copy of the model, to run once.
    """

    def __init__(
        self,
        root: nn.Module,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        copy: Callable[[nn.Module], Any],
        borrow: Callable[[], nn.Module],
    ) -> None:
        self._root = root
        self._given = given
        self._copy = copy
        self._borrow = borrow
        self._modules = dict(root.named_modules())
        self._pair: tuple[Any, Any] | None = None

    def works_in_a_mode(self) -> bool:
        """Whether the model takes the example in training or in evaluation."""
        for training in (True, False):
            try:
                outcome(self._copy(self._root), self._given, training)
            except Exception:
                continue
            return True
        return False

    def doubt(self, made: nn.Module, *, asks_sizes: bool) -> GraphBreak | None:
        """Return where a captured model does not do what the model does; None if it does.

        Copies of both go through the same calls, so that what one call leaves behind shows in the next.

        Args:
            made: the captured model.
            asks_sizes: whether its forward may know of sizes beside that of the batch.
        """
        doubt = self._doubt_in_another_type(made)
        if doubt is not None:
            return doubt
        doubt = self._doubt_at_other_sizes(made, asks_sizes)
        if doubt is not None:
            return doubt
        if any(_says_more_than_values(graph) for graph in _graphs_of(made)):
            for training in (True, False):
                try:
                    gradients = self._gradients(self._copy(self._root), self._given, training)
                except Exception:
                    continue
                copied = self._copy(made)
                doubt = self._difference(
                    self._gradients, copied, self._given, training, gradients, exact=False
                )
                if doubt is not None:
                    return doubt
        return None

    def _doubt_at_other_sizes(self, made: nn.Module, asks_sizes: bool) -> GraphBreak | None:
        self._pair = None
        # the two modes have one graph, and so one way to follow a size, unless numbers differ in it
        differs = any(graph.find_nodes(op="call_function", target=by_mode) for graph in _graphs_of(made))
        for given, of_samples in self._variants(made, asks_sizes):
            for training in (True, False) if of_samples or differs else (True,):
                doubt = self._doubt_about(made, given, training)
                if doubt is not None:
                    return doubt
        return None

    def _variants(self, made: nn.Module, asks_sizes: bool) -> Iterator[tuple[Any, bool]]:
        """Yield the example at the sizes to try, and whether only the number of samples is another."""
        yield self._given, True
        axes = axes_of(self._given)
        for place, axis in enumerate(axes if asks_sizes else axes[:1]):  # else Python knows of none
            of_samples = place == 0 or self._is_of_samples(axis)
            asked = (1, *sizes_asked_about(_graphs_of(made), axis)) if of_samples else ()
            for size in (2 * axis.size, *asked):
                with suppress(Exception):  # of a kind of tensor that has no other sizes
                    yield axis.resized(self._given, size), of_samples

    def _is_of_samples(self, axis: Axis) -> bool:
        try:
            found, with_first_again = (
                outcome(self._copy(self._root), given, training=False)[0]
                for given in (self._given, axis.resized(self._given, axis.size + 1))
            )
        except Exception:
            return False  # the model does not take it
        return is_of_samples(axis, found, with_first_again)

    def _doubt_about(self, made: nn.Module, given: Any, training: bool) -> GraphBreak | None:
        pair = self._pair = self._pair or (self._borrow(), self._copy(made))
        try:
            expected = outcome(pair[0], given, training)
        except Exception:
            self._pair = None  # nothing to compare with: the model does not work at this size
            return None
        return self._difference(outcome, pair[1], given, training, expected)

    def _doubt_in_another_type(self, made: nn.Module) -> GraphBreak | None:
        """Return a small module that does something else in half precision, where a question of its says so.

        It can stay in Python, so that the result can be converted, or run under autocast. A large one is left
        as it is, and such a call of it is an error.
        """
        if not any(_asks_for_types(graph) for graph in _graphs_of(made)):
            return None
        half = partial(_converted, dtype=torch.bfloat16)
        kind = next((tensor.device.type for tensor in self._root.parameters()), "cpu")
        for convert, context in ((half, nullcontext()), (deep_copy, torch.autocast(kind, torch.bfloat16))):
            try:
                given = convert(self._given) if convert is half else self._given
                with context:
                    outcome(convert(self._root), given, training=False)
            except Exception:
                continue  # nor does the model work so
            try:
                with context:
                    outcome(convert(made), given, training=False)
            except RecordingError as error:
                module = self._modules.get(error.module)
                if error.module and module is not None and all(map(is_leaf, module.children())):
                    return GraphBreak(error.module, str(error), all_alike=True)
            except Exception:
                continue
        return None

    def _gradients(self, model: nn.Module, given: Any, training: bool) -> Any:
        """Return which outputs have gradients, and the gradients of the parameters."""
        args, kwargs = cloned(given)
        switch_mode(model, training)
        torch.manual_seed(0)
        with torch.enable_grad():
            leaves = pytree.tree_leaves(model(*args, **kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            trained = [leaf.abs().double().pow(2).sum() for leaf in tensors if leaf.requires_grad]
            parameters = [p for p in model.parameters() if p.requires_grad]
            total = torch.stack(trained).sum() if trained else None
            gradients = None if total is None else torch.autograd.grad(total, parameters, allow_unused=True)
        return [leaf.requires_grad for leaf in tensors], gradients

    def _difference(
        self,
        result: Callable[..., Any],
        copied: nn.Module,
        given: Any,
        training: bool,
        expected: Any,
        *,
        exact: bool = True,
    ) -> GraphBreak | None:
        tolerance = 0.0 if exact else None  # None: what is usual for the type
        try:
            found = result(copied, given, training)
            if not (exact and _is_equal(found, expected)):  # which takes less time
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        except RecordingError as error:
            return GraphBreak(error.module, str(error))
        except Exception as error:
            mode = "training" if training else "evaluation"
            return GraphBreak("", f"what was recorded does not do what the model does in {mode}: {error}")
        return None


def _graphs_of(made: nn.Module) -> Iterator[Graph]:
    return (module.graph for module in made.modules() if isinstance(module, GraphModule))


def _asks_for_types(graph: Graph) -> bool:
    """Whether a graph checks what the type of a tensor was."""
    checks = graph.find_nodes(op="call_function", target=require_same)
    asked = [source for check in checks for node in check.all_input_nodes for source in node.all_input_nodes]
    return any(node.target is getattr and node.args[1] == "dtype" for node in asked)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a model, or of what it is given, in another type."""
    if isinstance(value, nn.Module):
        return deep_copy(value).to(dtype)
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value
    )


def _says_more_than_values(graph: Graph) -> bool:
    """Whether equal values do not show that gradients are equal too."""
    applies = any(isinstance(node.target, AppliedFunction) for node in graph.nodes)
    return applies or steers_gradients(graph) or has_checkpoints(graph)


def outcome(model: nn.Module, given: Any, training: bool) -> Any:
    """Return what a model returns in a mode, and its buffers after that."""
    args, kwargs = cloned(given)
    switch_mode(model, training)
    torch.manual_seed(0)
    with torch.no_grad(), plain_paths():
        output = model(*args, **kwargs)
    return {type(output).__name__: list(_content(output))}, dict(model.named_buffers())


def _is_equal(found: Any, expected: Any) -> bool:
    """Whether two outcomes are alike to the bit; False also where it takes more to tell."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        alike = (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
        return alike and found.layout is expected.layout is torch.strided and torch.equal(found, expected)
    if type(found) is not type(expected):
        return False
    if isinstance(found, dict):
        return found.keys() == expected.keys() and _is_equal(list(found.values()), list(expected.values()))
    if isinstance(found, (list, tuple)):
        return len(found) == len(expected) and all(map(_is_equal, found, expected))
    return type(found) in (bool, int, float) and found == expected


def cloned(given: Any) -> Any:
    """Return arguments with copies of their tensors; what is one tensor stays one."""
    copies: dict[int, Tensor] = {}

    def cloned(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return pytree.tree_map_only(Tensor, cloned, given)


def _content(output: Any) -> Iterator[Any]:
    """Yield the tensors and numbers in an output, those in objects of the model's own classes too."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, (Tensor, int, float)):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _content(list(vars(leaf).values()))
