"""Tracing a model without inputs, by proxies: a ``torch.fx.Tracer`` that refuses what the stock one loses.

Contexts of gradients and autocast become nodes, and so does a call of an autograd function. Contexts that a
graph has no node for, and checkpointing, are refused with the line of the model that uses them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy

from biofx.capture.attribute_reads import reads_noticed
from biofx.capture.bytecode import CallSite, catches_exceptions
from biofx.capture.graph_breaks import (
    OWN_APPLY,
    TOUCHES_STATE,
    RestartTracing,
)
from biofx.capture.intercepted_calls import (
    IN_SYMBOLIC_TRACES,
    applications_handled,
    assumed_range,
    builtins_patched,
    can_be_applied,
    checkpoints_handled,
    replaced,
    type_limits_followed,
)
from biofx.capture.proxies import TensorMode, TrainingFlag, Value
from biofx.capture.side_effects import Watch
from biofx.capture.symbolic_builder import SymbolicBuilder
from biofx.errors import CaptureError
from biofx.graph.graph_functions import AppliedFunction, limit_of
from biofx.graph.guards import require_default
from biofx.graph.node_kinds import changed_in_place
from biofx.layers.attention import can_be_looked_into, pads_by_nesting, transformers_as_nodes
from biofx.layers.layer_kind import hooks_of
from biofx.model.modes import ModeSwitches
from biofx.progress import advance
from biofx.torch_private import is_erased, pytree

_FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn")
_CATCHES = "catches exceptions, and whether another input raises them is not known before the graph runs"


class SymbolicTracer(SymbolicBuilder):
    """Traces one model.

    Args:
        root: the model.
        opaque: paths of modules that become one call each.
        foreign: ids of tensors that must not find their way into the graph.
        prefix: path of ``root`` itself, for messages.
        kept: paths of modules that keep their eager forward, and why; None where none may.
        watch: restores what a forward changes that is not part of the graph.
        mode: the mode to trace, None for a graph that must be right in both.
        touches_state: whether the forward has changed state of a module that is one call; None if that is not
            hidden.
        mode_switches: what train() and eval() change.
        assumed_length: how often a loop over a value runs; None to refuse such a loop.
    """

    def __init__(
        self,
        root: nn.Module,
        opaque: frozenset[str],
        foreign: frozenset[int],
        prefix: str,
        kept: dict[str, str] | None,
        watch: Watch,
        mode: bool | None = None,
        touches_state: Callable[[], bool] | None = None,
        mode_switches: ModeSwitches | None = None,
        assumed_length: int | None = None,
    ) -> None:
        super().__init__(root, foreign, prefix, kept, mode, mode_switches)
        self._assumed_length = assumed_length
        self.calls: list[str] = []
        """Paths of the modules that were called."""
        self._opaque = opaque
        self._watch = watch
        self._touches_state = touches_state

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Let everything that a forward does reach this tracer."""
        modules = self._modules.values()
        with ExitStack() as stack:
            for patch in (
                self._flags_as_proxies(),
                builtins_patched(modules, self._builtins()),
                applications_handled(self._apply, modules, self.refuse),
                transformers_as_nodes(),
                self._patches.patched(),
                checkpoints_handled(self._refuse_checkpoint),
                type_limits_followed(self._limit, Value),
                reads_noticed(modules, self),
                TensorMode(self),
                replaced(self._factories()),
            ):
                stack.enter_context(patch)
            self.is_following = True
            try:
                yield
            finally:
                self.is_following = False

    def _builtins(self) -> Mapping[str, Any]:
        length = self._assumed_length
        return (
            IN_SYMBOLIC_TRACES if length is None else {**IN_SYMBOLIC_TRACES, "range": assumed_range(length)}
        )

    def _factories(self) -> list[tuple[Any, str, Any]]:
        """Let functions that make tensors take sizes one by one that are not known, which torch refuses."""
        if self._assumed_length is None:
            return []

        def taking_values(original: Any) -> Any:
            def function(*args: Any, **kwargs: Any) -> Any:
                if any(issubclass(type(arg), Value) for arg in args):
                    return self.create_proxy("call_function", original, args, kwargs)
                return original(*args, **kwargs)

            return function

        return [(torch, name, taking_values(getattr(torch, name))) for name in _FACTORIES]

    # what torch.fx.Tracer calls

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Return the entries of a value, as many as are assumed, or refuse."""
        if self._assumed_length is None:
            return super().iter(obj)  # type: ignore[no-any-return]
        value: Any = obj
        return iter([value[place] for place in range(self._assumed_length)])

    def trace(self, root: Any, concrete_args: Any = None) -> Graph:
        """Trace, and check that nothing but the model's own tensors is changed in place."""
        graph = super().trace(root, concrete_args)
        if _catches(root):
            self.refuse(_CATCHES, "Rewrite it without that")
        if _uses_no_input(graph):
            self.refuse("has only optional arguments, and it is not known which of them will be given")
        for node in graph.nodes:
            if isinstance(node.type, str):
                node.type = None  # an annotation as text, which torch.jit.script could not make sense of
            for changed in changed_in_place(node):
                if changed.op == "get_attr" and changed.target in self._constants:
                    raise CaptureError(
                        f"the model's forward changes in place ({node.name}) a tensor that no module holds "
                        "and no call makes. Make it with torch.tensor, or make it a buffer"
                    )
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module becomes one call."""
        path = module_qualified_name
        if path in self._opaque or path in (self.kept or ()) or isinstance(m, torch.jit.ScriptModule):
            return True
        return super().is_leaf_module(m, path) and not can_be_looked_into(m)

    def path_of_module(self, mod: nn.Module) -> str:
        """Return the path of a module."""
        if id(mod) not in self._paths:
            self.refuse(
                f"calls a {type(mod).__name__} that is not a submodule of the model",
                "Make it one (nn.ModuleList and nn.ModuleDict hold several)",
            )
        path: str = self._paths[id(mod)]
        return path

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module: one node for a leaf, its eager forward otherwise."""
        path = self.path_of_module(m)
        advance("capture", len(self._paths))
        if self.is_leaf_module(m, path):
            self.calls.append(path)
            found = super().call_module(m, forward, args, kwargs)
            return self._expect_result(found) if path in (self.kept or ()) else found
        mark = _Mark.of(self)
        try:
            return self._call_traced(path, m, forward, args, kwargs)
        except Exception as error:
            if self.kept is None:
                raise
            first = next(iter(self.refusals.errors[mark.refusals :]), None)
            self.kept[path] = str(first or self.refusals.of(error))
            if path in self.calls[: mark.calls] or self._touches_state is not None:
                raise RestartTracing(self.kept) from error
            self._go_back(mark, m)
        self.calls.append(path)
        return self._expect_result(super().call_module(m, forward, args, kwargs))

    def _call_traced(
        self, path: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        refused = len(self.refusals.errors)
        if hooks := hooks_of(module):
            self.refusals.refuse_call(
                path,
                f"has {' and '.join(hooks)}, which a graph runs once, while it is captured, and never again. "
                "Remove them first",
            )
        self.calls.append(path)
        own = inspect.unwrap(type(module).forward)
        names = own.__code__.co_varnames[1:] if hasattr(own, "__code__") else ()
        self._expect_arguments(type(module), own, dict(zip(names, args, strict=False)) | kwargs)
        if pads_by_nesting(module, args, kwargs):
            forward = functools.partial(self._call_whole, path)
        found = super().call_module(module, forward, args, kwargs)
        if self.kept is not None and len(self.refusals.errors) > refused:
            raise self.refusals.errors[refused]
        if _catches(module):
            self.refusals.refuse_call(path, f"{_CATCHES}. Rewrite it without that")
        if self._touches_state is not None and self._touches_state():
            self.refusals.refuse_call(path, f"{TOUCHES_STATE}. Let that module do so")
        return found

    def _call_whole(self, path: str, *args: Any, **kwargs: Any) -> Proxy:
        return self.create_proxy("call_module", path, args, kwargs)

    def _expect_result(self, found: Any) -> Any:
        """Let the graph check what an eager forward returns, if the model compares that with None."""
        site = CallSite.in_model()
        if isinstance(found, Value) and site is not None and site.compares_identity_next:
            self.expect_given(found, "what it returns")
        return found

    def _go_back(self, mark: _Mark, module: nn.Module) -> None:
        """Remove what was traced since a mark."""
        for node in reversed(self.graph.nodes):
            if node is mark.last:
                break
            self.graph.erase_node(node)
        self._tensors = {path: read for path, read in self._tensors.items() if not is_erased(read.node)}
        self._shared = {key: node for key, node in self._shared.items() if not is_erased(node)}
        del self.log.reads[mark.reads :]
        for path in self.calls[mark.calls :]:
            self.num_calls[path] -= 1
        del self.refusals.errors[mark.refusals :]
        del self.calls[mark.calls :]
        self.module_stack.clear()
        self.module_stack.update(mark.module_stack)
        self._watch.restore(module)
        self._contexts.forget_loose()

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, Any]:
        """Return the proxies of the arguments, and the defaults of optional ones that Python decides by.

        Forwards look at an argument that is None, a flag or a text by default before they compute; and what
        ``**kwargs`` might hold is not known. So these count as not given.
        """
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters
        plain = all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
        if inspect.unwrap(root_fn) is not root_fn and not plain:
            self.refuse("is decorated, and takes more than plain arguments, which a graph cannot follow")
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for place, value in enumerate(args):
            if not isinstance(value, Proxy):
                continue
            name = str(value.node.target)
            if name.startswith("**"):
                self.graph.erase_node(value.node)
                args[place] = {}
            elif name in parameters and isinstance(parameters[name].default, (bool, str, type(None))):
                default = args[place] = parameters[name].default
                self.create_node("call_function", require_default, (value.node, default, name), {})
        given = {str(value.node.target): value for value in args if isinstance(value, Value)}
        self._expect_arguments(type(self.root), inspect.unwrap(root_fn), given)
        return function, args

    # what patches call

    def _limit(self, dtype: Value, name: str) -> Proxy:
        return self.create_proxy("call_function", limit_of, (dtype, name), {})

    def _refuse_checkpoint(self, *call: Any) -> NoReturn:
        self.refuse(
            "uses torch.utils.checkpoint, which a graph would drop",
            "Switch checkpointing off first, or give example_inputs",
        )

    def _apply(self, original: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add an autograd.Function as one call, even one without an operation of its own."""
        if any(isinstance(leaf, Value) for leaf in pytree.tree_leaves((args, kwargs))):
            if not can_be_applied(function):
                self.refuse(OWN_APPLY.format(function.__name__))
            return self.create_proxy("call_function", AppliedFunction(function), args, kwargs)
        return original(*args, **kwargs)

    @contextmanager
    def _flags_as_proxies(self) -> Iterator[None]:
        flags = {path: module.training for path, module in self._modules.items()}
        for path, module in self._modules.items():
            module.__dict__["training"] = TrainingFlag(self, path)
        try:
            yield
        finally:
            switched = [path for path, m in self._modules.items() if not isinstance(m.training, TrainingFlag)]
            for path, module in self._modules.items():
                module.__dict__["training"] = flags[path]
        if switched:
            raise CaptureError(
                f"the model's forward switches module {switched[0]!r} to training or evaluation, which a "
                "graph would do once and never again. Do it outside the forward, or name the module that "
                "does it in opaque=[…]"
            )


@dataclass(frozen=True)
class _Mark:
    """How far a trace was before it entered a module."""

    last: Node | None
    refusals: int
    calls: int
    module_stack: dict[str, Any]
    reads: int

    @classmethod
    def of(cls, tracer: SymbolicTracer) -> _Mark:
        last = next(iter(reversed(tracer.graph.nodes)), None)
        stack = dict(tracer.module_stack)
        return cls(last, len(tracer.refusals.errors), len(tracer.calls), stack, len(tracer.log.reads))


def _catches(module: nn.Module) -> bool:
    """Whether the forward of a module has an ``except`` clause."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and catches_exceptions(code)


def _uses_no_input(graph: Graph) -> bool:
    """Whether a graph has inputs, one of them None by default, and computes nothing with any."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    users = [user for node in inputs for user in node.users]
    checks = [user for user in users if user.target is require_default]
    return len(checks) == len(users) and any(user.args[1] is None for user in checks)
