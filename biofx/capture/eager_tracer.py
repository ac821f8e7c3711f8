"""Tracing a model while it runs on example inputs.

Each torch function that a forward calls becomes a node, each layer of torch's a call of its module. Real
tensors flow, so types, containers, lengths and optional arguments are what they are. Where a *value* would
decide what Python does next (``bool``, ``item``), the graph breaks: the module in which that happens runs on
untraced until it returns, its nodes are removed, and one call of it takes their place. So one run finds all
graph breaks.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from biofx.capture.attribute_reads import Read, reads_noticed
from biofx.capture.bytecode import CallSite, compares_identities
from biofx.capture.context_tracking import ContextPatches, OpenContexts
from biofx.capture.graph_breaks import COMPARES_IDENTITIES, OWN_APPLY, GraphBreak, describe
from biofx.capture.graph_builder import GraphBuilder
from biofx.capture.graph_signature import GraphSignature
from biofx.capture.intercepted_calls import (
    IN_EAGER_TRACES,
    OPTIONS,
    applications_handled,
    builtins_patched,
    can_be_applied,
    checkpointed_module,
    checkpoints_handled,
    replaced,
    type_limits_followed,
)
from biofx.capture.region_capture import is_leaf, is_plain_layer
from biofx.capture.symbolic_scalars import SymDtype, plain_inside
from biofx.capture.tensor_queries import TorchCall
from biofx.errors import InputError
from biofx.graph.graph_functions import AppliedFunction, call_checkpointed
from biofx.layers import LAYERS_OF_SEVERAL_INPUTS
from biofx.layers.attention import can_be_looked_into, pads_by_nesting, transformers_as_nodes
from biofx.layers.layer_kind import hooks_of
from biofx.model.graph_module import why_not_a_graph_module
from biofx.model.modes import ModeSwitches


class EagerTracer(TorchFunctionMode):
    """Traces one run of a model.

    Args:
        root: the model.
        kept: paths of modules that keep their eager forward; what they call gets graphs of its own.
        opaque: paths of modules not to look into.
        mode_switches: what train() and eval() change.
    """

    def __init__(
        self,
        root: nn.Module,
        kept: Mapping[str, str],
        opaque: frozenset[str],
        mode_switches: ModeSwitches | None = None,
    ) -> None:
        super().__init__()
        self.mode_switches = mode_switches or ModeSwitches()
        self.graphs: dict[str, list[Graph]] = {}
        self.reads: dict[str, list[Read]] = {}
        """What the forward behind each graph read from attributes."""
        self.layers: dict[str, None] = {}
        """Paths of the layers that Python calls."""
        self.calls: Counter[str] = Counter()
        """How often each module was called."""
        self.asks: set[tuple[str, str]] = set()
        """Paths of modules that asked for ``training``, and of those whose it was."""
        self.assigned: set[tuple[str, str]] = set()
        """Paths of modules and names of their buffers to which nodes assign."""
        self.found: dict[str, str] = {}
        """Paths of further modules at which the graph breaks, and why."""
        self.asks_sizes = False
        """Whether a forward could learn how large a tensor is."""
        self._made: dict[int, nn.Module] = {}
        """Modules that the forwards made, by their ids."""
        self.is_stale = False
        """Whether what calls those modules, or what they call, has to be traced again."""
        self.failed_in = ""
        """Path of the innermost module out of which an exception came."""
        self._failure: tuple[str, str] | None = None
        self._builder: GraphBuilder | None = None
        self._is_quiet = False
        self._root = root
        self._kept = kept
        self._opaque = opaque
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._contexts = ContextPatches(self._open_contexts, self.stop, self.give_up)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the model, which must be in the mode to trace.

        Raises:
            GraphBreak: a module must keep its eager forward.
            InputError: the model itself fails on these inputs.
        """
        with (
            self._module_patched(),
            self._forwards_patched(),
            self._contexts.patched(),
            checkpoints_handled(self._checkpoint),
            applications_handled(self._apply, self._root.modules(), self._break),
            transformers_as_nodes(),
            type_limits_followed(SymDtype.limit),
            builtins_patched(self._root.modules(), IN_EAGER_TRACES),
            reads_noticed(self._root.modules(), self),
            self,
        ):
            try:
                if "" in self._kept:
                    self._root(*args, **kwargs)
                else:
                    self._in_graph("", self._root, self._root.forward, args, dict(kwargs))
            except Exception as error:
                raise InputError(
                    f"example_inputs: the model fails on them: {type(error).__name__}: {error}"
                ) from error
        if self._failure is not None:
            path, caught = self._failure
            described = describe(path, self._root.get_submodule(path))
            raise GraphBreak(
                path, f"{described} catches {caught}, an exception that another input may not raise"
            )

    # graph breaks

    def stop(self, what: str) -> NoReturn:
        """Break the graph at the module that is running."""
        path = self._builder.innermost if self._builder is not None else ""
        raise GraphBreak(path, f"{self._where(path)} {what}")

    def _break(self, what: str) -> None:
        """Break the graph if something is being added to one."""
        if self.tracing() is not None:
            self._succeeds(lambda: self.stop(what))

    def give_up(self, found: BaseException) -> None:
        """Let the module at which the graph breaks run on untraced, if it is not the whole model."""
        builder = self._builder
        if not isinstance(found, GraphBreak) or builder is None or not found.path or found.path in self.found:
            raise found
        self.found[found.path] = found.reason
        builder.broken_at = found.path

    def _succeeds(self, add: Callable[[], object]) -> bool:
        """Add something to the graph; whether that can be done, or breaks it."""
        try:
            add()
        except GraphBreak as found:
            self.give_up(found)
            return False
        return True

    def note_failure(self, error: Exception) -> None:
        """Note an exception, which the forward may catch."""
        if self._builder is not None and self._failure is None:
            self._failure = self._builder.innermost, f"{type(error).__name__}: {error}"

    def _where(self, path: str) -> str:
        described, site = describe(path, self._root.get_submodule(path)), CallSite.in_model()
        line = "" if site is None else site.line_with_source
        return f"{described}, {line}" if line else described

    # what is traced

    def tracing(self) -> GraphBuilder | None:
        """Return the graph that what happens now belongs to, None if it belongs to none."""
        builder = self._builder
        return None if self._is_quiet or builder is None or builder.broken_at is not None else builder

    @property
    def is_following(self) -> bool:
        """Whether what happens now belongs to a graph."""
        return self.tracing() is not None

    @property
    def is_switching(self) -> bool:
        """Whether a context is being entered or left."""
        return self._contexts.is_switching

    def path_of(self, module: nn.Module) -> str | None:
        """Return the path of a module in the whole model, None if it has none."""
        return self._paths.get(id(module))

    def was_made(self, module: nn.Module) -> bool:
        """Whether a forward made a module, so that it holds what every call makes anew."""
        return id(module) in self._made

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Run code that is one node already."""
        before, self._is_quiet = self._is_quiet, True
        try:
            yield
        finally:
            self._is_quiet = before

    @contextmanager
    def _building(self, builder: GraphBuilder | None) -> Iterator[None]:
        """Let what happens belong to a graph; to None in a forward that stays in Python."""
        outer, self._builder = self._builder, builder
        try:
            yield
        finally:
            self._builder = outer

    def _open_contexts(self) -> OpenContexts | None:
        builder = self.tracing()
        return None if builder is None else builder.contexts

    # torch functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = TorchCall(self, func, args, dict(kwargs or {}))
        builder = self.tracing()
        if builder is None:
            return call.untraced()
        try:
            return call.traced(builder)
        except GraphBreak as found:
            self.give_up(found)
            return call.untraced()

    def _apply(self, original: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the application of an autograd function."""

        def application(builder: GraphBuilder) -> Node:
            if not can_be_applied(function):
                self.stop(OWN_APPLY.format(function.__name__))
            builder.contexts.check()
            given = builder.argument(tuple(args)), builder.argument(dict(kwargs))
            return builder.node("call_function", AppliedFunction(function), *given)

        builder, node = self._added(application)
        if builder is None:
            return original(*args, **kwargs)
        with self.quiet():
            found = original(*args, **kwargs)
        return builder.take(node, found)

    def _checkpoint(
        self, original: Callable[..., Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Add the checkpointed call of a module as one node; the module gets a graph of its own."""

        def checkpointed_call(builder: GraphBuilder) -> Node:
            module = checkpointed_module(function)
            if module is None or self.path_of(module) is None:
                self.stop("checkpoints something other than the call of a submodule (torch.utils.checkpoint)")
            if "context_fn" in kwargs:
                self.stop("checkpoints with a context_fn (torch.utils.checkpoint)")
            options = {name: value for name, value in kwargs.items() if name in OPTIONS}
            named = {name: value for name, value in kwargs.items() if name not in OPTIONS}
            builder.contexts.check()
            given = builder.argument(tuple(args)), builder.argument(named), builder.argument(options)
            called = builder.node("get_attr", builder.local_path(module))
            return builder.node("call_function", call_checkpointed, (called, *given))

        builder, node = self._added(checkpointed_call)
        if builder is None:
            return original(function, *args, **kwargs)
        with self._building(None):
            found = original(function, *plain_inside(args), **plain_inside(kwargs))
        return builder.take(node, found)

    def _added(self, make: Callable[[GraphBuilder], Node]) -> tuple[GraphBuilder | None, Any]:
        """Add a node to the present graph; None where there is none, or the node breaks it."""
        builder, added = self.tracing(), []
        if builder is None or not self._succeeds(lambda: added.append(make(builder))):
            return None, None
        return builder, added[0]

    # modules

    def _call(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        builder, path = self._builder, self.path_of(module)
        if self._is_quiet or (builder is not None and builder.broken_at is not None):
            return original(module, *args, **kwargs)
        was_called = self.calls[path or ""] > 0
        if path is not None:
            self.calls[path] += 1
        if builder is None:
            return self._call_from_python(path, module, original, args, kwargs)
        if self.was_made(module):
            return original(module, *args, **kwargs)  # it is gone after the call, as what it computed with is
        if not self._succeeds(lambda: builder.local_path(module)) or path is None:
            return original(module, *args, **kwargs)
        is_whole = path in self._opaque or self._is_kept(path) or is_leaf(module)
        if not is_whole and hooks_of(module):
            self.found[path] = f"{self._where(path)} has {' and '.join(hooks_of(module))}"
            is_whole = True
        if is_whole or pads_by_nesting(module, args, kwargs):
            return self._call_whole(builder, path, module, original, args, kwargs)
        mark = builder.mark()
        try:
            with builder.inside(module, path):
                if compares_identities(type(module)):
                    self._succeeds(lambda: self.stop(COMPARES_IDENTITIES))
                found = original(module, *args, **kwargs)
        except Exception as error:
            self.failed_in = self.failed_in or path
            if builder.broken_at == path:
                builder.go_back(mark)
                self.note_failure(error)
            raise
        if builder.broken_at != path:
            return found
        self.is_stale |= was_called or next(module.children(), None) is not None
        builder.go_back(mark)
        return self._call_whole(builder, path, module, lambda *_, **__: found, args, kwargs)

    def _is_kept(self, path: str | None) -> bool:
        return path in self._kept or path in self.found

    def _call_whole(
        self, builder: GraphBuilder, path: str, module: nn.Module, original: Any, args: Any, kwargs: Any
    ) -> Any:
        """Add a call of a module as one node."""
        given: list[Any] = []

        def prepare() -> None:
            # a graph break here is one of the module that calls, not of the one that is called
            builder.contexts.check()
            given.extend((builder.argument(tuple(args)), builder.argument(dict(kwargs))))

        if not self._succeeds(prepare):
            return original(module, *args, **kwargs)
        with builder.inside(module, path):
            node = builder.node("call_module", builder.local_path(module), *given)
            with self._building(None) if self._is_kept(path) else self.quiet():
                found = original(module, *plain_inside(args), **plain_inside(kwargs))
            return builder.take(node, found)

    def _call_from_python(
        self, path: str | None, module: nn.Module, original: Any, args: Any, kwargs: Any
    ) -> Any:
        """Call a module from a forward that stays in Python."""
        if path is None or path in self._opaque or is_leaf(module):
            is_plain = path not in self._opaque and is_plain_layer(module)
            takes_more = isinstance(module, LAYERS_OF_SEVERAL_INPUTS)
            if path is not None and is_plain and (takes_more or (len(args) == 1 and not kwargs)):
                self.layers.setdefault(path)
            with self.quiet():
                return original(module, *args, **kwargs)
        only_holds = type(module).forward is nn.Sequential.forward
        if self._is_kept(path) or only_holds or next(module.parameters(), None) is None:
            return original(module, *args, **kwargs)
        reason = None
        if hooks := hooks_of(module):
            reason = f"has {' and '.join(hooks)}"
        elif (why_not := why_not_a_graph_module(module)) is not None:
            reason = f"is called from Python, and {why_not}"
        if reason is not None:
            self.found[path] = f"{describe(path, module)} {reason}"
            return original(module, *args, **kwargs)
        return self._in_graph(path, module, lambda *a, **k: original(module, *a, **k), args, kwargs)

    def _in_graph(self, path: str, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Call a module, and build a graph of its own."""
        builder = GraphBuilder(self, path, module)
        signature = GraphSignature(builder)
        bound: list[Any] = [args, kwargs]
        with self._building(builder):
            if compares_identities(type(module)):
                raise GraphBreak(path, f"{describe(path, module)} {COMPARES_IDENTITIES}")
            self._succeeds(lambda: bound.__setitem__(slice(None), signature.bind(module, args, kwargs)))
            found = forward(*bound[0], **bound[1])
            if builder.broken_at is None and self._succeeds(lambda: signature.end(found)):
                self.graphs.setdefault(path, []).append(builder.graph)
                self.reads.setdefault(path, []).extend(builder.log.reads)
            else:
                self.is_stale = True
        return plain_inside(found)

    # attributes of modules

    def attribute_read(self, owner: nn.Module, names: tuple[str, ...], value: Any, site: CallSite) -> Any:
        """Note that a forward reads an attribute; return what it gets."""
        builder = self.tracing()
        if builder is None:
            return value
        try:
            return builder.attribute_read(owner, names, value, site)
        except GraphBreak as found:
            self.give_up(found)
            return value

    def _assign(self, module: nn.Module, name: str, value: Any) -> None:
        """Add the assignment to a buffer; any other one is found as a change of the module."""
        builder, path = self.tracing(), self.path_of(module)
        before = vars(module).get("_buffers", {}).get(name)
        if builder is None or path is None or before is None or before is value:
            return

        def add() -> None:
            builder.contexts.check()
            if builder.assign(module, path, name, value):
                self.assigned.add((path, name))

        if isinstance(value, Tensor):
            self._succeeds(add)

    def _ask(self, module: nn.Module) -> None:
        """Note that something may depend on the mode that a module is in."""
        builder, path = self.tracing(), self.path_of(module)
        if builder is not None and path is not None:
            self.asks.add((builder.innermost, path))
            if path in self.mode_switches.stuck and is_leaf(module):
                builder.flag_read(module)

    def _forwards_patched(self) -> Any:
        """Let ``module.forward(…)``, in a forward that stays in Python, be what a call of the module is."""

        def patched(path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)
            def called(*args: Any, **kwargs: Any) -> Any:
                if self._builder is not None or self._is_quiet or self._is_kept(path):
                    return forward(*args, **kwargs)
                return self._call(module, lambda _, *a, **k: forward(*a, **k), args, kwargs)

            return called

        return replaced(
            (vars(module), "forward", patched(path, module, module.forward))
            for path, module in self._root.named_modules()
            if self._kept and path and "forward" not in vars(module)
            if not is_leaf(module) and not can_be_looked_into(module)  # which would not be as torch made it
        )

    def _module_patched(self) -> Any:
        """Let ``nn.Module`` report calls, assignments and reads of ``training``."""
        original_call, original_set = nn.Module.__call__, nn.Module.__setattr__
        original_init = nn.Module.__init__

        def init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if self.tracing() is not None and id(module) not in self._paths:
                self._made[id(module)] = module
            original_init(module, *args, **kwargs)

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._call(module, original_call, args, kwargs)

        def set_attribute(module: nn.Module, name: str, value: Any) -> None:
            self._assign(module, name, value)
            original_set(module, name, value)

        def training(module: nn.Module) -> Any:
            self._ask(module)
            held = vars(module)
            return held["training"] if "training" in held else module.__getattr__("training")

        def set_training(module: nn.Module, flag: bool) -> None:
            vars(module)["training"] = flag

        return replaced(
            [
                (nn.Module, "training", property(training, set_training)),
                (nn.Module, "__call__", call),
                (nn.Module, "__init__", init),
                (nn.Module, "__setattr__", set_attribute),
            ]
        )
