"""The differential check: trial runs of a captured model against the model itself.

Both run at other sizes than those of the example, in both modes and with other dtypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from biofx.capture.example_sizes import Axis, axes_of, is_of_samples, sizes_queried
from biofx.capture.graph_breaks import GraphBreak
from biofx.capture.region_capture import is_leaf
from biofx.graph.branches import by_mode
from biofx.graph.contexts import steers_gradients
from biofx.graph.graph_functions import AppliedFunction, has_checkpoints
from biofx.graph.guards import RecordingError, require_same
from biofx.layers.attention import plain_paths
from biofx.model.copies import deep_copy
from biofx.model.modes import switch_mode
from biofx.static_inspection import is_of
from biofx.torch_private import apply_to_tensors, pytree


class TrialModel:
    """A copy of a model that is restored after a trial run, instead of copied for each.

    A run may have changed tensors that its modules hold, and nothing else.

    Args:
        model: the copy, as it is to be at the start of each run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
        held = [value for module in model.modules() for value in vars(module).values()]
        held += [buffer for _, buffers in self._buffers for buffer in buffers.values()]
        self._values = [(value, value.detach().clone()) for value in held if is_of(value, Tensor)]

    def restore(self) -> nn.Module:
        """Restore the model, except for its mode, and return it."""
        for buffers, before in self._buffers:
            buffers.update(before)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)
        return self.model


class DifferentialCheck:
    """Compares what a model and a captured form of it do, on copies of both.

    Args:
        root: the model.
        given: the example, positional and keyword arguments.
        copy: makes a copy of either model.
        borrow: returns a copy of ``root`` for one run.
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
        self._failed: tuple[Any, bool] | None = None

    def works_in_a_mode(self) -> bool:
        """Whether the model takes the example in training or in evaluation."""
        for training in (True, False):
            with suppress(Exception):
                outcome(self._copy(self._root), self._given, training)
                return True
        return False

    def graph_break(self, made: nn.Module, *, queries_sizes: bool) -> GraphBreak | None:
        """Return the graph break that a captured model needs, None if it does what the model does.

        Copies of both go through the same calls, so that effects of one call on the next are compared too.

        Args:
            made: the captured model.
            queries_sizes: whether its forward may depend on sizes other than that of the batch.
        """
        return (
            self._break_in_another_dtype(made)
            or self._break_at_other_sizes(made, queries_sizes)
            or self._break_in_gradients(made)
        )

    def _break_in_another_dtype(self, made: nn.Module) -> GraphBreak | None:
        """Return a break at a small module whose check of a dtype fails in half precision or under autocast.

        In Python, that module can be converted. A larger one stays a graph, and raises at such a call.
        """
        if not any(_checks_dtypes(graph) for graph in _graphs_of(made)):
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

    def _break_at_other_sizes(self, made: nn.Module, queries_sizes: bool) -> GraphBreak | None:
        self._pair = None
        # the two modes have one graph, and so depend on sizes in one way, unless numbers differ in it
        differs = any(graph.find_nodes(op="call_function", target=by_mode) for graph in _graphs_of(made))
        for given, of_samples in self._examples(made, queries_sizes):
            for training in (True, False) if of_samples or differs else (True,):
                found = self._break_with(made, given, training)
                if found is not None:
                    return found
        return None

    def _examples(self, made: nn.Module, queries_sizes: bool) -> Iterator[tuple[Any, bool]]:
        """Yield the example at the sizes to try, and whether only the number of samples is another."""
        yield self._given, True
        axes = axes_of(self._given)
        for place, axis in enumerate(axes if queries_sizes else axes[:1]):
            of_samples = place == 0 or self._is_of_samples(axis)
            queried = (1, *sizes_queried(_graphs_of(made), axis)) if of_samples else ()
            for size in (2 * axis.size, *queried):
                with suppress(Exception):  # a kind of tensor that has no other sizes
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

    def _break_with(self, made: nn.Module, given: Any, training: bool) -> GraphBreak | None:
        pair = self._pair = self._pair or (self._borrow(), self._copy(made))
        try:
            expected = outcome(pair[0], given, training)
        except Exception:
            self._pair = None  # there is nothing to compare with: the model does not work at this size
            return None
        found = _difference(outcome, pair[1], given, training, expected)
        self._failed = None if found is None else (given, training)
        return found

    def region_that_differs(self, made: nn.Module, paths: Iterable[str]) -> str | None:
        """Return the path of the first region to give, in the last call that failed, what the model does not.

        Args:
            made: the captured model.
            paths: of its regions.
        """
        if self._failed is None:
            return None
        expected, found = (_outputs(self._copy(model), paths, *self._failed) for model in (self._root, made))
        for (path, output), (other, given) in zip_longest(expected, found, fillvalue=(None, None)):
            if path != other and other is not None:
                return None
            if other is None or not _is_equal(given, output):
                return path  # which raises if it gives nothing
        return None

    def _break_in_gradients(self, made: nn.Module) -> GraphBreak | None:
        if not any(_says_more_than_values(graph) for graph in _graphs_of(made)):
            return None
        for training in (True, False):
            try:
                expected = gradients(self._copy(self._root), self._given, training)
            except Exception:
                continue
            found = _difference(gradients, self._copy(made), self._given, training, expected, exact=False)
            if found is not None:
                return found
        return None


def outcome(model: nn.Module, given: Any, training: bool) -> Any:
    """Return what a model returns in a mode, and its buffers after that."""
    args, kwargs = cloned(given)
    switch_mode(model, training)
    torch.manual_seed(0)
    with torch.no_grad(), plain_paths():
        output = model(*args, **kwargs)
    return {type(output).__name__: list(_content(output))}, dict(model.named_buffers())


def _outputs(
    model: nn.Module, paths: Iterable[str], given: Any, training: bool
) -> list[tuple[str | None, Any]]:
    """Return what each call of some modules gives in a call of the model, as far as that comes."""
    found: list[tuple[str | None, Any]] = []
    for path in paths:

        def note(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            found.append((path, cloned(list(_content(output)))))

        model.get_submodule(path).register_forward_hook(note)
    with suppress(Exception):
        outcome(model, given, training)
    return found


def gradients(model: nn.Module, given: Any, training: bool) -> Any:
    """Return which outputs of a model have gradients, and the gradients of its parameters."""
    args, kwargs = cloned(given)
    switch_mode(model, training)
    torch.manual_seed(0)
    with torch.enable_grad():
        leaves = pytree.tree_leaves(model(*args, **kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        trained = [leaf.abs().double().pow(2).sum() for leaf in tensors if leaf.requires_grad]
        parameters = [p for p in model.parameters() if p.requires_grad]
        total = torch.stack(trained).sum() if trained else None
        found = None if total is None else torch.autograd.grad(total, parameters, allow_unused=True)
    return [leaf.requires_grad for leaf in tensors], found


def _difference(
    result: Callable[[nn.Module, Any, bool], Any],
    model: nn.Module,
    given: Any,
    training: bool,
    expected: Any,
    *,
    exact: bool = True,
) -> GraphBreak | None:
    tolerance = 0.0 if exact else None  # None is the usual one of the dtype
    try:
        found = result(model, given, training)
        if not (exact and _is_equal(found, expected)):  # which takes less time
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    except RecordingError as error:
        return GraphBreak(error.module, str(error))
    except Exception as error:
        mode = "training" if training else "evaluation"
        return GraphBreak("", f"what was recorded does not do what the model does in {mode}: {error}")
    return None


def _is_equal(found: Any, expected: Any) -> bool:
    """Whether two outcomes are equal to the bit; may be False where only a closer look shows it."""
    leaves, structure = pytree.tree_flatten(found)
    other_leaves, other_structure = pytree.tree_flatten(expected)
    return structure == other_structure and all(map(_is_equal_leaf, leaves, other_leaves))


def _is_equal_leaf(found: Any, expected: Any) -> bool:
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        alike = (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
        return alike and found.layout is expected.layout is torch.strided and torch.equal(found, expected)
    return type(found) is type(expected) and type(found) in (bool, int, float) and found == expected


def cloned(given: Any) -> Any:
    """Return arguments with copies of their tensors; a tensor that occurs twice is copied once."""
    copies: dict[int, Tensor] = {}

    def cloned(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return pytree.tree_map_only(Tensor, cloned, given)


def _content(output: Any) -> Iterator[Any]:
    """Yield the tensors and numbers in an output, those in dataclasses included."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, (Tensor, int, float)):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _content(list(vars(leaf).values()))


def _converted(value: Any, dtype: torch.dtype) -> Any:
    """Return a copy of a model or of its arguments with floating point tensors of another dtype."""

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if isinstance(value, nn.Module):
        converting = deep_copy(value)
        apply_to_tensors(converting, converted)
        return converting
    return pytree.tree_map_only(Tensor, converted, value)


def _graphs_of(made: nn.Module) -> Iterator[Graph]:
    return (module.graph for module in made.modules() if isinstance(module, GraphModule))


def _checks_dtypes(graph: Graph) -> bool:
    """Whether a graph checks that a tensor has the dtype that it was recorded with."""
    checks = graph.find_nodes(op="call_function", target=require_same)
    queries = [
        source for check in checks for node in check.all_input_nodes for source in node.all_input_nodes
    ]
    return any(node.target is getattr and node.args[1] == "dtype" for node in queries)


def _says_more_than_values(graph: Graph) -> bool:
    """Whether equal values do not show that gradients are equal too."""
    applies = any(isinstance(node.target, AppliedFunction) for node in graph.nodes)
    return applies or steers_gradients(graph) or has_checkpoints(graph)
