"""From a model to a graph that computes the same thing every time it is called.

Symbolic tracing alone loses things without a word: a training flag, random numbers and tensors made in
``forward`` become constants, gradient and autocast contexts and hooks of containers vanish. Here each is
either written down as a node or refused with the line of the model that asks for it.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from biofx.errors import CaptureError, InputError
from biofx.graph_module import BioGraphModule
from biofx.sites import find_sites, hooks_of


def capture(
    model: nn.Module, *, share_parameters: bool = False, opaque: Sequence[str] = ()
) -> BioGraphModule:
    """Return a model as a graph module of its own; the model itself is not touched.

    Args:
        model: any module; one that is a graph module already keeps its graph.
        share_parameters: let the result hold the model's own parameters instead of copies. Buffers are
            copied all the same.
        opaque: paths of modules not to look into, which then become one call each.

    Raises:
        InputError: ``model`` is not a module, is wrapped or compiled, has parameters that are not
            initialised yet, cannot be copied, or has no module at a path of ``opaque``.
        CaptureError: its forward cannot be captured without losing something; the message names the
            module and the line.
    """
    _check_input(model)
    _check_paths(model, opaque)
    with preserved_random_state():
        memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share_parameters else {}
        if isinstance(model, GraphModule):
            captured = BioGraphModule.copy_of(model, memo)
        else:
            root = _copy(model, memo)
            captured = BioGraphModule.from_root(root, _trace(root, frozenset(opaque)))
    _complete_module_stacks(captured)
    return captured


def trace_function(function: Callable[[Any], Any]) -> Graph:
    """Return the graph of a function of one tensor.

    Raises:
        CaptureError: it cannot be captured without losing something.
    """

    class Holder(nn.Module):
        def forward(self, x: Any) -> Any:
            return function(x)

    with preserved_random_state():
        return _trace(Holder(), frozenset())


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave the global random states of Python, NumPy (where it is loaded) and torch as they were."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    python_state = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy_random is not None:
                numpy_random.set_state(numpy_state)


_WRAPPERS = {
    "DistributedDataParallel": "wrap the result instead: DistributedDataParallel(bio_model)",
    "DataParallel": "wrap the result instead: DataParallel(bio_model)",
    "FullyShardedDataParallel": "shard the result instead",
    "FSDPModule": "shard the result instead: fully_shard(bio_model)",
    "OptimizedModule": "transform the model first and compile the result: torch.compile(bio_model)",
    "ScriptModule": "transform the model before it is scripted",
    "AveragedModel": "transform model.module and average the result",
}


def _check_input(model: object) -> None:
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        hint = "; create an instance of it first" if isinstance(model, type) else ""
        raise InputError(f"expected a torch.nn.Module, found {what}{hint}")
    for path, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)
        if wrapper is not None and (not path or wrapper != "ScriptModule"):
            what = f"one whose module {path!r} is a {wrapper}" if path else f"a {wrapper}"
            raise InputError(f"expected an unwrapped model, found {what}; {_WRAPPERS[wrapper]}")
    for path, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(
                f"expected initialised parameters, found {path!r} still lazy; run the model once first"
            )


def _check_paths(model: nn.Module, opaque: Sequence[str]) -> None:
    if isinstance(opaque, str):
        raise InputError(f"opaque: expected a list of module paths, found the text {opaque!r}")
    paths = {path for path, _ in model.named_modules() if path}
    for path in opaque:
        if path not in paths:
            raise InputError(
                f"opaque: expected the path of a module, found {path!r}, which the model does not have"
            )


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"expected a model that copy.deepcopy can copy; {type(model).__name__} makes it fail: {error}"
        ) from error


def _trace(root: nn.Module, opaque: frozenset[str]) -> Graph:
    tracer = _Tracer(root, opaque)
    watch = _Watch(root)
    try:
        with tracer.flags_as_nodes(), _RecordFactories(tracer):
            graph = tracer.trace(root, concrete_args=_fixed_arguments(root))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"{_place(error, tracer)}: {error}; {_REMEDY}") from error
    watch.refuse_side_effects()
    return graph


def _fixed_arguments(root: nn.Module) -> dict[str, Any]:
    """Return the optional arguments that a forward looks at before it computes: those left out are not given.

    The graph checks them when it runs, so that giving another value is an error and not a wrong result.
    """
    parameters = inspect.signature(inspect.unwrap(type(root).forward)).parameters.values()
    return {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, (bool, str))}


class _Watch:
    """Notices what a forward does besides computing: each would happen once, while it is captured."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._before = self._attributes()
        self._random = _random_states()

    def refuse_side_effects(self) -> None:
        """Raise a CaptureError if the forward drew random numbers or left something in a module."""
        drawn = [name for name, state in _random_states().items() if state != self._random[name]]
        if drawn:
            raise CaptureError(
                f"the model's forward draws from the random numbers of {' and '.join(drawn)}, which a graph "
                "would do once and never again. Draw tensors with torch, or name the module in opaque=[…]"
            )
        for path, attributes in self._attributes().items():
            for name, value in attributes.items():
                if name not in self._before[path] or self._before[path][name] != value:
                    owner = f"module {path!r}" if path else "the model"
                    raise CaptureError(
                        f"the forward of {owner} changes its attribute {name!r}, which a graph would do once "
                        "and never again. Return the value or make it a buffer that is changed in place, or "
                        "name the module in opaque=[…]"
                    )

    def _attributes(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return, for each attribute of each module, its identity and (of a container) its length."""
        return {
            path: {
                name: (id(value), len(value) if isinstance(value, (list, dict, set)) else 0)
                for name, value in (*vars(module).items(), *module._buffers.items())
                if name != "training"
            }
            for path, module in self._root.named_modules()
        }


def _random_states() -> dict[str, Any]:
    """Return the states of the global random number generators, comparable."""
    states: dict[str, Any] = {"Python": random.getstate(), "torch": torch.get_rng_state().numpy().tobytes()}
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    if numpy_random is not None:
        kind, keys, *rest = numpy_random.get_state()
        states["NumPy"] = (kind, keys.tobytes(), *rest)
    return states


_REMEDY = (
    "what Python decides from values cannot be part of a graph. Rewrite that line, or name the module in "
    "opaque=[…] to keep it as one call"
)


class _Tracer(Tracer):
    """Symbolic tracing that writes down, or refuses, what the stock tracer loses."""

    def __init__(self, root: nn.Module, opaque: frozenset[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self.proxy_buffer_attributes = True
        self._opaque = opaque
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._ambient = _ambient_modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = module_qualified_name in self._opaque or isinstance(m, torch.jit.ScriptModule)
        return whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        hooks = hooks_of(m)
        if hooks and not self.is_leaf_module(m, path):
            raise CaptureError(
                f"{self._named(m)} has {' and '.join(hooks)}, which a graph runs once, while it is captured, "
                f"and never again. Remove them first, or name it in opaque=[{path!r}] to keep it as one call"
            )
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Node:
        if kind.startswith("call"):
            self._refuse_lost_context()
        return super().create_node(kind, target, args, kwargs, *rest, **more)

    def _refuse_lost_context(self) -> None:
        """Raise a CaptureError if what is being called stands in a context that a graph would drop."""
        if _ambient_modes() != self._ambient:
            raise CaptureError(
                f"{self.where()} works under a gradient or autocast context (torch.no_grad, torch.autocast), "
                f"which a graph would drop. Open it around the model instead, or {_keep_as_one_call(self)}"
            )
        for frame, _ in traceback.walk_stack(None):
            lost = _LOST_FRAMES.get(frame.f_code)
            if lost is not None:
                raise CaptureError(f"{self.where()} {lost}, or {_keep_as_one_call(self)}")

    @contextmanager
    def flags_as_nodes(self) -> Iterator[None]:
        """While tracing, let ``self.training`` of every module be a node that reads the flag when run."""
        flags = {path: module.training for path, module in self._modules.items()}
        for path, module in self._modules.items():
            module.__dict__["training"] = _TrainingFlag(self, path)
        try:
            yield
        finally:
            for path, module in self._modules.items():
                module.__dict__["training"] = flags[path]

    def where(self) -> str:
        """Name the module call that is being traced, and the line of it that is running."""
        frames = [(frame, line) for frame, line in traceback.walk_stack(None)]
        return self.describe(frames)

    def describe(self, frames: Sequence[tuple[Any, int]]) -> str:
        """Name the innermost of ``frames`` (innermost first) that runs the user's model."""
        for frame, line in frames:
            module = frame.f_locals.get("self")
            file = frame.f_code.co_filename
            if id(module) in self._paths and not file.startswith(_TORCH) and module is not None:
                source = linecache.getline(file, line).strip()
                return f"{self._named(module)}, {file}:{line} ({source})" if source else self._named(module)
        return "the model's forward"

    def _named(self, module: nn.Module) -> str:
        path = self._paths.get(id(module), "")
        return (
            f"module {path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
        )

    @property
    def innermost(self) -> str:
        """Path of the module that is being called."""
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""


_TORCH = torch.__path__[0]
_LOST_FRAMES = {
    torch.autograd.Function.apply.__func__.__code__: (  # type: ignore[attr-defined]
        "calls a torch.autograd.Function, whose backward a graph would drop. Register it as a "
        "torch.library.custom_op instead"
    ),
    inspect.unwrap(checkpoint).__code__: (
        "uses torch.utils.checkpoint, which a graph would drop. Switch checkpointing off first"
    ),
}


def _keep_as_one_call(tracer: _Tracer) -> str:
    path = tracer.innermost
    return (
        f"name the module in opaque=[{path!r}] to keep it as one call"
        if path
        else "put the lines in a submodule"
    )


def _place(error: BaseException, tracer: _Tracer) -> str:
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return f"cannot capture {tracer.describe(frames[::-1])}"


class _TrainingFlag(Proxy):
    """``module.training`` while tracing: a node where it is passed on, an error where it decides."""

    def __init__(self, tracer: _Tracer, path: str) -> None:
        self.tracer = self._model_tracer = tracer
        self._path = path
        self._made: Node | None = None

    @property
    def node(self) -> Node:  # type: ignore[override]
        """The node that reads the flag, made when first asked for."""
        if self._made is None or self._made.graph is not self.tracer.graph:
            target = f"{self._path}.training" if self._path else "training"
            self._made = self.tracer.create_node("get_attr", target, (), {}, target.replace(".", "_"))
        return self._made

    def __bool__(self) -> bool:
        raise CaptureError(
            f"{self._model_tracer.where()} does one thing in training and another in evaluation, and a graph "
            f"would keep only one of them. Pass self.training on to a function that takes it, or "
            f"{_keep_as_one_call(self._model_tracer)}"
        )


class _RecordFactories(TorchFunctionMode):
    """Writes down tensors that a forward makes from nothing, so that each call makes its own."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        operands = list(_leaves((args, options)))
        if any(isinstance(operand, Proxy) for operand in operands):
            if func in _FACTORIES:
                return self._tracer.create_proxy("call_function", func, tuple(args), options)
            return func(*args, **options)
        if func in _FACTORIES:
            return self._tracer.create_proxy("call_function", func, tuple(args), options)
        name = getattr(func, "__name__", "")
        changes = (
            (name.endswith("_") and not name.endswith("__")) or "out" in options or name in _IN_PLACE_SIGNS
        )
        if changes and any(isinstance(operand, Tensor) for operand in operands):
            raise CaptureError(
                f"{self._tracer.where()} changes a tensor of the model in place ({name}), which a graph "
                "would do once and never again. Make the tensor a buffer, or "
                f"{_keep_as_one_call(self._tracer)}"
            )
        return func(*args, **options)


_IN_PLACE_SIGNS = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"})
_FACTORIES: frozenset[Any] = frozenset(
    {
        torch.arange,
        torch.bernoulli,
        torch.empty,
        torch.empty_strided,
        torch.eye,
        torch.full,
        torch.hamming_window,
        torch.hann_window,
        torch.linspace,
        torch.logspace,
        torch.multinomial,
        torch.normal,
        torch.ones,
        torch.poisson,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.scalar_tensor,
        torch.tensor,
        torch.tril_indices,
        torch.triu_indices,
        torch.zeros,
    }
)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _ambient_modes() -> tuple[Any, ...]:
    """Return the gradient and autocast modes in force."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices),
    )


def _complete_module_stacks(graph_module: BioGraphModule) -> None:
    """Say of nodes that came without it (from a graph traced elsewhere) which module they belong to."""
    calls: dict[str, int] = {}
    modules = dict(graph_module.named_modules())
    layer_of = {site.node: site.layer for site in find_sites(graph_module).found}
    for node in graph_module.graph.nodes:
        path = str(node.target) if node.op == "call_module" else layer_of.get(node, "")
        if node.meta.get("nn_module_stack") or not path or path not in modules:
            continue
        count = calls[path] = calls.get(path, -1) + 1
        key = f"{path}@{count}" if count else path
        node.meta["nn_module_stack"] = {key: (path, type(modules[path]))}
