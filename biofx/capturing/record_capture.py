"""Capture from example inputs: record, unify the modes, and try the result before trusting it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from biofx.capturing.both_modes import unified
from biofx.capturing.forward_recorder import Recorder
from biofx.capturing.frames import Keep, joined_path
from biofx.capturing.region_capture import capture_regions, capture_uncalled, weights_read_by_python
from biofx.capturing.side_effects import Watch
from biofx.errors import CaptureError, InputError
from biofx.graph.autograd_functions import AppliedFunction
from biofx.graph.checkpointing import checkpoints
from biofx.graph.contexts import steers_gradients
from biofx.graph.guards import RecordingError
from biofx.graph.own_forward import own_forward_graph
from biofx.graph.regions import is_inside
from biofx.model.graph_module import BioGraphModule, become_graph_module

ExampleInputs = tuple[Sequence[Any], Mapping[str, Any]]


def capture_recorded(
    root: nn.Module, example_inputs: ExampleInputs, opaque: frozenset[str], foreign: frozenset[int]
) -> BioGraphModule:
    """Turn a model, in place, into a graph module by recording what it does on example inputs.

    Args:
        root: the model, made for this.
        example_inputs: positional and keyword arguments of one call.
        opaque: paths of modules not to look into.
        foreign: ids of tensors that must not find their way into a graph.

    Raises:
        InputError: the example inputs are not of that form, or the model fails on them.
        CaptureError: not even regions can be captured.
    """
    args, kwargs = _checked(example_inputs)
    front_end = _RecordCapture(root, args, kwargs, opaque, foreign)
    return front_end.captured()


def _checked(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if (
        not isinstance(example_inputs, tuple)
        or len(example_inputs) != 2
        or not isinstance(example_inputs[0], (tuple, list))
        or not isinstance(example_inputs[1], Mapping)
    ):
        raise InputError(
            "example_inputs: expected (args, kwargs), e.g. ((x,), {}) or ((), {'input_ids': ids}), found "
            f"{type(example_inputs).__name__}"
        )
    return tuple(example_inputs[0]), dict(example_inputs[1])


class _RecordCapture:
    def __init__(
        self,
        root: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        opaque: frozenset[str],
        foreign: frozenset[int],
    ) -> None:
        self._root = root
        self._given = args, kwargs
        self._opaque = opaque
        self._foreign = foreign
        self._modules = dict(root.named_modules())
        self._kept: dict[str, str] = {}
        self._own = {id(p): p for p in root.parameters()}
        # for all trial runs: a forward may write into its parameters
        self._scratch = {id(p): copy.deepcopy(p) for p in root.parameters()}
        self._on_meta = any(tensor.is_meta for tensor in (*root.parameters(), *root.buffers()))

    def captured(self) -> BioGraphModule:
        """Record until it holds."""
        while True:
            try:
                recorded = self._recorded()
                made = self._assembled(copy.deepcopy(self._root, dict(self._own)), *recorded)
                doubt = None if self._on_meta else self._doubt(made)
                self._check_parameters()
                if doubt is None:
                    return made
                self._keep(doubt if doubt.path not in self._kept else Keep("", doubt.reason))
            except InputError:
                if not self._on_meta and not self._runs_by_itself():
                    raise
                break  # it asks for values, and has none, or does not run while it is recorded
            except CaptureError:  # it cannot be recorded at all
                break
        return capture_regions(self._root, self._opaque, self._foreign)

    def _runs_by_itself(self) -> bool:
        try:
            for training in (True, False):
                _outcome(self._copy(self._root), self._given, training)
        except Exception:
            return False
        return True

    def _copy(self, model: nn.Module) -> Any:
        """Return a copy to try something on."""
        return copy.deepcopy(model, dict(self._scratch))

    def _check_parameters(self) -> None:
        for key, parameter in self._own.items():
            tried = self._scratch[key]
            if not parameter.is_meta and not torch.allclose(tried, parameter, rtol=0, atol=0, equal_nan=True):
                raise CaptureError("the model's forward writes into its parameters")

    def _recorded(self) -> tuple[dict[str, Graph], list[str], set[str]]:
        while True:
            try:
                runs = [self._run(training) for training in (True, False)]
                return self._unified(*runs)
            except Keep as found:
                self._keep(found)

    def _keep(self, found: Keep) -> None:
        if found.path in self._kept:
            raise CaptureError(found.reason)
        alike = type(self._modules[found.path])
        for path, module in self._modules.items():
            # modules of one class mostly stop at one line: that saves recording anew for each
            if path == found.path:
                self._kept[path] = found.reason
            elif path and found.path and type(module) is alike:
                self._kept.setdefault(
                    path, f"as {found.path!r}, which is a {alike.__name__} too: {found.reason}"
                )

    def _run(self, training: bool) -> Recorder:
        """Record one run, on a copy, so that nothing of it stays."""
        model = self._copy(self._root)
        model.train(training)
        watch = Watch(model)
        recorder = Recorder(model, self._kept, self._opaque)
        args, kwargs = _cloned(self._given)
        recorder.run(args, kwargs)
        watch.allowed = recorder.assigned
        changed = [path for path in watch.changed_modules() if path not in self._kept]
        if changed:
            raise Keep(changed[0], f"module {changed[0]!r} changes its attributes in the forward")
        if "" not in self._kept:
            try:
                watch.refuse_side_effects(torch_draws=True)
            except CaptureError as error:
                raise Keep("", str(error)) from None
        return recorder

    def _unified(
        self, training: Recorder, evaluation: Recorder
    ) -> tuple[dict[str, Graph], list[str], set[str]]:
        graphs: dict[str, Graph] = {}
        paths = dict.fromkeys([*training.graphs, *evaluation.graphs])
        for path in sorted(paths, key=len):  # whoever decides how to call a module, ahead of that module
            found = [recorder.graphs.get(path, []) for recorder in (training, evaluation)]
            if not all(found):
                raise Keep(path, f"module {path!r} is called in one mode only")
            for calls in found:
                if any(_text(call) != _text(calls[0]) for call in calls):
                    raise Keep(path, f"module {path!r} does not do the same at every call")
            graphs[path] = unified(path, found[0][0], found[1][0])
        layers = list(dict.fromkeys([*training.layers, *evaluation.layers]))
        graphs = {path: graphs[path] for path in paths}
        return graphs, layers, training.paths_called | evaluation.paths_called

    def _assembled(
        self, root: nn.Module, graphs: dict[str, Graph], layers: list[str], called: set[str]
    ) -> BioGraphModule:
        modules = dict(root.named_modules())
        kept = {path: reason for path, reason in self._kept.items() if path in called or not path}
        regions = [path for path in graphs if path]
        for path in regions:
            become_graph_module(modules[path], graphs[path])
        settled = [
            inner
            for path in regions
            for name, inner in modules[path].named_modules()
            if not any(_is_between(path, around, joined_path(path, name)) for around in kept)
        ]
        settled += [modules[path] for path in called | set(kept)]
        rest = capture_uncalled(root, self._opaque, self._foreign, kept, settled)
        made = become_graph_module(root, graphs.get("") or own_forward_graph())
        made.region_paths = (*regions, *layers, *rest.regions)
        made.kept_as_python = kept | rest.kept
        made.read_by_python = weights_read_by_python(made)
        return made

    def _doubt(self, made: BioGraphModule) -> Keep | None:
        """Return where the result does not do what the model does; None if it does.

        Copies of both go through the same calls, so that what one call leaves behind shows in the next.
        """
        pair: tuple[Any, Any] | None = None
        for training in (True, False):
            for given in _variants(*self._given):
                pair = pair or (self._copy(self._root), self._copy(made))
                try:
                    expected = _outcome(pair[0], given, training)
                except Exception:
                    pair = None  # nothing to compare with: the model does not work at this size
                    continue
                doubt = self._difference(_outcome, pair[1], given, training, expected)
                if doubt is not None:
                    return doubt
            if any(_says_more_than_values(graph) for graph in _graphs_of(made)):
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

    def _gradients(self, model: nn.Module, given: Any, training: bool) -> Any:
        """Return which outputs have gradients, and the gradients of the parameters."""
        args, kwargs = _cloned(given)
        model.train(training)
        torch.manual_seed(0)
        with torch.enable_grad():
            leaves = pytree.tree_leaves(model(*args, **kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            trained = [leaf.abs().double().pow(2).sum() for leaf in tensors if leaf.requires_grad]
            parameters = [p for p in self._scratch.values() if p.requires_grad]
            total = torch.stack(trained).sum() if trained else None
            gradients = None if total is None else torch.autograd.grad(total, parameters, allow_unused=True)
        return [leaf.requires_grad for leaf in tensors], gradients

    def _difference(
        self,
        outcome: Callable[..., Any],
        copied: BioGraphModule,
        given: Any,
        training: bool,
        expected: Any,
        *,
        exact: bool = True,
    ) -> Keep | None:
        tolerance = 0.0 if exact else None  # None: what is usual for the type
        try:
            found = outcome(copied, given, training)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        except RecordingError as error:
            return Keep(error.module, str(error))
        except Exception as error:
            mode = "training" if training else "evaluation"
            return Keep("", f"what was recorded does not do what the model does in {mode}: {error}")
        return None


def _graphs_of(made: nn.Module) -> Iterator[Graph]:
    return (module.graph for module in made.modules() if isinstance(module, GraphModule))


def _says_more_than_values(graph: Graph) -> bool:
    """Whether equal values do not show that gradients are equal too."""
    applies = any(isinstance(node.target, AppliedFunction) for node in graph.nodes)
    return applies or steers_gradients(graph) or checkpoints(graph)


def _is_between(region: str, kept: str, path: str) -> bool:
    """Whether a module of a region is inside one that keeps its own forward, which is in the region."""
    return is_inside(kept, region) and is_inside(path, kept)


def _outcome(model: nn.Module, given: Any, training: bool) -> Any:
    args, kwargs = _cloned(given)
    model.train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(*args, **kwargs)
    return {type(output).__name__: list(_content(output))}, dict(model.named_buffers())


def _cloned(given: Any) -> Any:
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


def _variants(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the example, then the example with one of its sizes doubled wherever it occurs."""
    given = (args, kwargs)
    yield given
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    sizes = dict.fromkeys((axis == 0, size) for tensor in tensors for axis, size in enumerate(tensor.shape))
    for first, size in sizes:

        def doubled(tensor: Tensor, first: bool = first, size: int = size) -> Tensor:
            for axis, found in enumerate(tensor.shape):
                if found == size and (axis == 0) == first:
                    tensor = torch.cat([tensor, tensor], axis)
            return tensor

        yield pytree.tree_map_only(Tensor, doubled, given)


def _text(graph: Graph) -> str:
    return str(graph)
