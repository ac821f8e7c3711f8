"""A backend of ``torch.compile`` that rewrites dynamo's graphs, and hands them on to another backend."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from biofx.compiling.companions import Companion
from biofx.compiling.dynamo_frames import (
    Compilation,
    current_compilation,
    running_module,
)
from biofx.compiling.flat_graphs import FlatGraph, flat_graph, modes_read
from biofx.compiling.named_graphs import NamedGraph, module_paths, translated
from biofx.compiling.rewriter import REWRITERS, Rewriter, companion_among, elsewhere, warn_of_python
from biofx.compiling.skipped_frames import watch_skipped_frames
from biofx.config import BioConfig
from biofx.errors import BiofxError, BiofxWarning, CaptureError, OptionError
from biofx.model.graph_module import BioGraphModule
from biofx.rewriting.compile_config import PassChoice, choose_passes
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.report import Report
from biofx.select import Selector
from biofx.torch_private import compiler_of, inductor_with, recompile_limit, take_origin
from biofx.transform import as_config

Compiler = Callable[..., Callable[..., Any]]
"""Takes a graph module and example inputs, and returns what computes the same."""


def backend(
    config: BioConfig | Mapping[str, Any] | None = None,
    *,
    then: str | Compiler = "inductor",
    passes: PassChoice | None = None,
    only: Selector | None = None,
    exclude: Selector | None = None,
    initialise: bool = False,
) -> Backend:
    """Return a backend for ``torch.compile`` that rewrites the graphs which it is given.

    ``torch.compile(model, backend=biofx.backend(config))`` learns as ``biofx.transform(model, config)`` does,
    with the model's own parameters, so its optimizer stays as it is. Rates, signs and masks are in the
    module that :func:`biofx.companion` returns. Whatever is compiled again (another batch size, ``eval()``)
    takes its state from there.

    Args:
        config: as for :func:`biofx.transform`.
        then: what compiles the rewritten graphs: the name of a backend of torch (``"inductor"``,
            ``"aot_eager"``, ``"eager"``), or a function as ``torch.compile`` takes it.
        passes: as for :func:`biofx.transform`.
        only: as for :func:`biofx.transform`.
        exclude: as for :func:`biofx.transform`.
        initialise: whether weights are given, in place and at the first call, the values that the passes
            start from. Signs and masks do that by default in a config; without this they are refused.

    Raises:
        OptionError: the config has an unknown field or a bad value, asks for what cannot live in a graph
            (sub-weights, expanded units), or torch has no backend called ``then``. What only the graph can
            show is raised by the first call of the compiled model.
        PipelineError: ``passes`` names an unknown pass, or the order is cyclic.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> compiled = torch.compile(model, backend=backend({"fuzzy_learning_rate_factor_nu": 0.2}, then="eager"))
    >>> compiled(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """
    if not isinstance(initialise, bool):
        raise OptionError(f"initialise: expected True or False, found {initialise!r}")
    checked = as_config(config)
    pipeline = choose_passes(passes, checked)
    if only is not None or exclude is not None:
        pipeline = Pipeline((pipeline,), only=only, exclude=exclude)
    _refuse_new_parameters(pipeline)
    return Backend(_compiler(then), Rewriter(pipeline, checked, initialise))


class Backend:
    """What :func:`biofx.backend` returns: a function of a graph and its inputs, as dynamo calls it."""

    def __init__(self, then: Compiler, rewriter: Any) -> None:
        self._then: Compiler = then
        self._rewriter: Rewriter = rewriter
        self._counts: dict[Any, int] = {}
        self._name = getattr(then, "__name__", type(then).__name__)
        REWRITERS.add(rewriter)
        watch_skipped_frames()

    def __repr__(self) -> str:
        return f"biofx.backend({str(self._rewriter.pipeline)!r}, then={self._name})"

    def left_to_python(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
        """Return the names of weights that no graph reads, and of which nobody was told before."""
        return self._rewriter.left_to_python(named)

    @property
    def reports(self) -> tuple[Report, ...]:
        """What was done to each graph, in the order in which they were compiled."""
        return tuple(self._rewriter.reports)

    def companion(self, model: Callable[..., Any]) -> BioGraphModule:
        """Return :func:`biofx.companion` of a model that was compiled with this backend and maybe others.

        Raises:
            InputError: it was not, or was not called yet.
        """
        return companion_among([self._rewriter], model)

    def __call__(
        self, graph_module: GraphModule, example_inputs: Sequence[Any], **options: Any
    ) -> Callable[..., Any]:
        """Rewrite a graph and compile it.

        Args:
            graph_module: as dynamo makes it.
            example_inputs: what it is called with.
            **options: ``mode`` and ``options`` of ``torch.compile``, for the backend that compiles.
        """
        then = self._then
        if options and then is compiler_of("inductor"):
            then = inductor_with(options.get("mode"), options.get("options"), None)
        elif options:
            inner = then
            then = lambda graph, inputs: inner(graph, inputs, **options)  # noqa: E731
        try:
            inputs = graph_module.graph.find_nodes(op="placeholder")
            values = {node.name: value for node, value in zip(inputs, example_inputs, strict=False)}
            parameters = [value for value in values.values() if isinstance(value, nn.Parameter)]
            compilation = current_compilation(graph_module, parameters)
            if compilation is None:
                return then(graph_module, list(example_inputs))
            made = RewrittenGraph(graph_module, compilation, self._rewriter, then)
            made.compile(values)
            self._count(compilation)
        except BiofxError as error:  # dynamo would wrap it, or run the graph as it is
            return _refusing(error)
        return made

    def _count(self, compilation: Compilation) -> None:
        """Warn when dynamo has compiled a function as often as it does; from then on it runs it as it is."""
        count = self._counts[compilation.code] = self._counts.get(compilation.code, 0) + 1
        if count >= recompile_limit():
            warnings.warn(
                f"{compilation.code.co_name} has been compiled {count} times, and dynamo stops there: "
                "for what would be a further graph it runs the model as it is, without rates and signs. Find "
                "out what changes with TORCH_LOGS=recompiles, or raise torch._dynamo.config.recompile_limit",
                BiofxWarning,
                stacklevel=2,
            )


class RewrittenGraph:
    """A graph of dynamo that was rewritten: a function of its inputs, which looks up the state by itself.

    Args:
        source: as dynamo made it.
        compilation: what it is of.
        rewriter: has the passes, and the state.
        then: compiles what the passes make.
    """

    def __init__(
        self, source: GraphModule, compilation: Compilation, rewriter: Rewriter, then: Compiler
    ) -> None:
        self._source, self._compilation = source, compilation
        self._rewriter, self._then = rewriter, then
        self._paths = module_paths(compilation.model)
        self._inputs = [node.name for node in source.graph.find_nodes(op="placeholder")]
        self._of: list[_OfModel] = []

    def compile(self, values: Mapping[str, Any]) -> None:
        """Rewrite the graph for the model that is being compiled, and compile it.

        Raises:
            BiofxError: as for :meth:`Rewriter.rewritten`.
        """
        entry = self._for(values, self._compilation, self._paths)
        self._of.append(entry)
        entry.compiled([values[name] for name in self._inputs], self._then)

    def __call__(self, *args: Any) -> Any:
        """Compute what the graph does."""
        for entry in self._of:
            if entry.is_for(args):
                if entry.calls < 2:
                    self._say_what_is_left(entry)
                return entry.compiled(args, self._compile_late)(*args, *entry.state())
        self._add(args)
        return self(*args)

    def _say_what_is_left(self, entry: _OfModel) -> None:
        """Warn of weights that no graph reads, at the second call: all parts of the first are compiled."""
        entry.calls += 1
        model = entry.model
        if entry.calls == 2 and model is not None:
            warn_of_python(self._rewriter, model, stacklevel=3)

    def _add(self, args: tuple[Any, ...]) -> None:
        """Rewrite the graph for another module of the same class, or for others of its parameters.

        Dynamo has code run for every object of which its guards hold.

        Raises:
            CaptureError: whose parameters these are is not known.
        """
        model = running_module()
        now = {} if model is None else {id(value): path for path, value in _tensors(model)}
        values = dict(zip(self._inputs, args, strict=True))
        named = dict(zip(self._inputs, self._of[0].paths, strict=True)) if self._of else {}
        moved = {path: now.get(id(values[name])) for name, path in named.items() if path is not None}
        if model is None or not moved or None in moved.values():
            raise CaptureError(
                f"a graph that was compiled for a {type(self._compilation.model).__name__} is called with "
                "parameters of another; compile each model with a backend of its own: "
                "torch.compile(model, backend=biofx.backend(config))"
            )
        companion = self._rewriter.companion_of(model)
        if companion is not None:
            companion.follow_parameters(model)
        self._of[1:] = [entry for entry in self._of[1:] if entry.is_current()]
        paths = translated(self._paths, {old: str(new) for old, new in moved.items()})
        self._of.append(self._for(values, elsewhere(self._compilation, model), paths))

    def _for(self, values: Mapping[str, Any], compilation: Compilation, paths: Mapping[int, str]) -> _OfModel:
        named, companion = self._rewriter.rewritten(self._source, values, paths, compilation)
        return _OfModel(compilation.model, self._source, named, companion)

    def _compile_late(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph when dynamo does not, by asking it to: it guards sizes that it left open."""
        if self._then is compiler_of("eager"):
            return graph_module.forward
        made: Callable[..., Any] = torch.compile(graph_module.forward, backend=self._then)
        return made


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


class _OfModel:
    """A rewritten graph with the state of one model."""

    def __init__(
        self, model: nn.Module, source: GraphModule, named: NamedGraph, companion: Companion
    ) -> None:
        self._model = weakref.ref(model)
        self.calls = 0
        self._source, self._named, self._companion = source, named, companion
        self._modes = modes_read(named.module.graph)
        self.paths = tuple(named.inputs.values())
        own = dict(model.named_parameters())
        self._parameters = [(place, own[path]) for place, path in enumerate(self.paths) if path in own]
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._flat: dict[tuple[bool, ...], FlatGraph] = {}
        self._reads: dict[tuple[bool, ...], tuple[tuple[nn.Module, str], ...]] = {}

    @property
    def model(self) -> nn.Module | None:
        """The model, while there is one."""
        return self._model()

    def is_for(self, args: Sequence[Any]) -> bool:
        """Whether these are the parameters of the model."""
        return all(args[place] is parameter for place, parameter in self._parameters)

    def is_current(self) -> bool:
        """Whether the model still holds these parameters."""
        model = self._model()
        held = {} if model is None else dict(model.named_parameters())
        return all(held.get(str(self.paths[place])) is parameter for place, parameter in self._parameters)

    def state(self) -> list[Any]:
        """Return the tensors that the graph takes behind its inputs, as they are now."""
        return [getattr(owner, name) for owner, name in self._reads[self._mode()]]

    def _mode(self) -> tuple[bool, ...]:
        model: Any = self._model()
        return tuple(model.get_submodule(_layer_of(path)).training for path in self._modes)

    def compiled(self, args: Sequence[Any], compiler: Compiler) -> Callable[..., Any]:
        """Return what computes the graph for the modes and the kinds of state that there are now.

        Args:
            args: the inputs of dynamo's graph.
            compiler: compiles it, if it is not compiled yet.
        """
        mode = self._mode()
        if mode not in self._flat:
            modes = dict(zip(self._modes, mode, strict=True))
            self._flat[mode] = flat = flat_graph(self._named, self._companion.find, modes)
            take_origin(flat.module, self._source)
            places = (path.rpartition(".") for path in flat.state)
            self._reads[mode] = tuple(
                (self._companion.module.get_submodule(owner), name) for owner, _, name in places
            )
        state = self.state()
        key = (mode, *((tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for tensor in state))
        if key not in self._compiled:
            self._compiled[key] = compiler(self._flat[mode].module, [*args, *state])
        return self._compiled[key]


def _layer_of(path: str) -> str:
    """Return the path of the layer whose mode a state follows."""
    return path.partition(".bio_mod")[0] if ".bio_mod" in path else "" if path == "bio_mod" else path


def _refusing(error: BiofxError) -> Callable[..., NoReturn]:
    """Return a function that raises an error."""

    def refuse(*args: Any) -> NoReturn:
        raise type(error)(*error.args) from error

    return refuse


def _compiler(then: str | Compiler) -> Compiler:
    """Return the function of a backend.

    Raises:
        OptionError: torch has none of that name.
    """
    if not isinstance(then, str) and not callable(then):
        raise OptionError(f"then: expected the name of a backend or a function, found {then!r}")
    try:
        return compiler_of(then)
    except Exception as error:
        known = ", ".join(torch.compiler.list_backends())
        raise OptionError(f"then: expected a backend of torch ({known}), found {then!r}") from error


def _refuse_new_parameters(entry: Pass) -> None:
    """Refuse passes that give a model parameters, or other shapes of them.

    Raises:
        OptionError: there is one.
    """
    if isinstance(entry, Pipeline):
        for member in entry.passes:
            _refuse_new_parameters(member)
        return
    variants = [dict(override.options) for override in entry.overrides]
    asked = {
        name: {getattr(entry, name, None), *(given.get(name) for given in variants)}
        for name in ("mode", "method")
    }
    found = ""
    if entry.name == "split-weights" and "sub-weights" in asked["mode"]:
        found = "weight_splitting_mode='sub-weights' puts several parameters in the place of one"
    elif entry.name == "expand-units" or (entry.name == "constrain-signs" and "expand" in asked["method"]):
        found = "dales_method='expand' makes layers wider"
    if found:
        raise OptionError(
            f"{found}, and what is compiled is the model with the parameters that it has; transform it first "
            "and compile the result: torch.compile(biofx.transform(model, config).graph_module)"
        )
