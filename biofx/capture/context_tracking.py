"""Contexts that a forward opens while it is captured: ``torch.no_grad``, ``torch.autocast`` and the like.

Entering one becomes a node, and leaving it another (:mod:`biofx.graph.contexts`). What a graph has no node
for breaks it: another context around an operation, a context left open, and code that asks in what context it
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.autograd import grad_mode
from torch.backends import cuda
from torch.fx import Node, Proxy

from biofx.capture.bytecode import CallSite
from biofx.capture.graph_breaks import OPENS_CONTEXT
from biofx.capture.intercepted_calls import replaced
from biofx.capture.symbolic_scalars import Builder, plain
from biofx.graph.contexts import BEGINNINGS, autocast_nesting, begin_autocast, begin_grad_mode
from biofx.torch_private import autocast_options, parametrizations_are_cached, saved_tensors_are_hooked


@dataclass
class _Open:
    """A context that is open."""

    context: int
    begin: Node
    modes: tuple[Any, ...]


class OpenContexts:
    """The contexts that one forward has open."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._before = ambient_modes()
        self._open: list[_Open] = []
        self._loose: object = None
        self.devices_asked: set[str] = set()
        """Types of devices that the forward asked tensors for, and may now use as constants."""

    def check(self) -> None:
        """Break the graph where something is in force that none of its contexts accounts for."""
        modes = self._open[-1].modes if self._open else self._before
        if self._loose is not None or ambient_modes() != modes:
            self._builder.stop(OPENS_CONTEXT)

    def check_end(self) -> None:
        """Break the graph of a forward that returns with a context open."""
        self.check()
        if self._open:
            self._builder.stop("leaves a context open")

    def forget_loose(self) -> None:
        """Forget a switch outside of any context: the code that made it is not part of the graph."""
        self._loose = None

    @property
    def depth(self) -> int:
        """How many contexts are open, a count."""
        return len(self._open)

    def go_back(self, depth: int) -> None:
        """Forget all but the first ``depth`` contexts: what opened the others is not part of the graph."""
        del self._open[depth:]
        self._loose = None

    def made(self, switch: object) -> None:
        """Note a ``set_grad_enabled``, which acts at once, whether or not it is used as a context."""
        self._loose = switch

    def begun(self, context: object, begin: Callable[..., Any], options: tuple[Any, ...]) -> None:
        """Add the node that begins a context."""
        if self._loose is context:
            self._loose = None
        anchor = next((node for node in self._builder.graph.nodes if node.op == "placeholder"), None)
        if anchor is None:
            self._builder.stop("opens a context in a forward without arguments")
        if begin is begin_autocast and options[0] in self.devices_asked:
            self._builder.stop("opens torch.autocast for a device that it may have asked a tensor for")
        opened = _Open(id(context), anchor, ambient_modes())
        place = len(self._open)
        self._open.append(opened)
        try:
            opened.begin = self._builder.write(begin, (anchor, *options))
        except BaseException:
            del self._open[place:]
            raise

    def ended(self, context: object, *, failed: bool) -> None:
        """Add the node that ends a context, unless the forward fails in it."""
        innermost = self._open.pop() if self._open else None
        if failed:
            self._loose = innermost  # a forward that catches the exception is not traced further
            return
        if innermost is None or innermost.context != id(context):
            self._builder.stop("leaves contexts in another order than it enters them")
        if next(iter(reversed(self._builder.graph.nodes))) is innermost.begin:
            self._builder.graph.erase_node(innermost.begin)  # nothing happened in it
        else:
            self._builder.write(BEGINNINGS[innermost.begin.target], (innermost.begin,))  # type: ignore[index]


_ATTENTION_KERNELS: tuple[Callable[[], bool], ...] = (
    *(cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled),
    *(cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled),
)


def ambient_modes() -> tuple[Any, ...]:
    """Return what is in force around an operation and would be lost with the Python code around it."""
    return (
        autocast_nesting(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch.get_default_dtype(),
        torch.initial_seed(),
        parametrizations_are_cached(),
        saved_tensors_are_hooked(),
        *(is_enabled() for is_enabled in _ATTENTION_KERNELS),
    )


_QUERIES = {
    "is_grad_enabled": "whether gradients are on",
    **dict.fromkeys(("is_autocast_enabled", "is_autocast_cpu_enabled"), "whether autocast is on"),
    **dict.fromkeys(
        ("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype"), "to what autocast casts"
    ),
}
"""Functions of torch that return in what context they are called, and what a message says of that."""


class ContextPatches:
    """Patches torch's contexts to report to the graph of the forward that enters them.

    Args:
        current: returns the contexts of that forward, None where it is not being captured.
        stop: breaks the graph.
        give_up: gets the exception of a graph break, and returns if the forward shall run on untraced.
    """

    def __init__(
        self,
        current: Callable[[], OpenContexts | None],
        stop: Callable[[str], NoReturn],
        give_up: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._current = current
        self._stop = stop
        self._give_up = give_up
        self.is_switching = False
        """Whether a context is being entered or left, which switches gradients by itself."""
        self._given: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Report every context that is entered meanwhile."""
        with ExitStack() as stack:
            for patch in (
                self._reported(grad_mode.no_grad, begin_grad_mode, lambda context: (False,)),
                self._reported(grad_mode.enable_grad, begin_grad_mode, lambda context: (True,)),
                self._reported(grad_mode.set_grad_enabled, begin_grad_mode, lambda context: (context.mode,)),
                self._reported(torch.autocast, begin_autocast, self._autocast_options),
                self._loose_switches(grad_mode.set_grad_enabled),
                self._autocasts(),
                replaced((torch, name, self._query(name, what)) for name, what in _QUERIES.items()),
            ):
                stack.enter_context(patch)
            yield

    def _reported(self, kind: Any, begin: Callable[..., Any], options: Callable[[Any], Any]) -> Any:
        enter, leave = kind.__enter__, kind.__exit__

        def entered(context: Any) -> Any:
            open_contexts = self._current()
            with self._switching():
                found = None if _is_symbolic(context) else enter(context)
            if open_contexts is not None:
                try:
                    self._try(open_contexts.begun, context, begin, options(context))
                except BaseException:
                    with self._switching():
                        leave(context, None, None, None)
                    raise
            return found

        def left(context: Any, kind_of: Any, error: Any, trace: Any) -> Any:
            open_contexts = self._current()
            with self._switching():
                found = leave(context, kind_of, error, trace)
            if open_contexts is not None:
                self._try(open_contexts.ended, context, failed=kind_of is not None)
            return found

        return replaced([(kind, "__enter__", entered), (kind, "__exit__", left)])

    def _loose_switches(self, kind: Any) -> Any:
        make, decorate = kind.__init__, kind.__call__

        def made(switch: Any, mode: Any) -> None:
            with self._switching() as was_switching:
                if isinstance(mode, Proxy):
                    switch.prev, switch.mode = torch.is_grad_enabled(), mode
                else:
                    make(switch, mode)
            if not was_switching and (open_contexts := self._current()) is not None:
                open_contexts.made(switch)

        def decorated(switch: Any, function: Any) -> Any:
            with self._switching():
                found = decorate(switch, function)
            if (open_contexts := self._current()) is not None:
                open_contexts.forget_loose()
            return found

        return replaced([(kind, "__init__", made), (kind, "__call__", decorated)])

    def _autocasts(self) -> Any:
        make = torch.autocast.__init__

        def made(
            context: Any,
            device_type: str,
            dtype: torch.dtype | None = None,
            enabled: bool = True,
            cache_enabled: bool | None = None,
        ) -> None:
            make(context, device_type, plain(dtype), enabled, cache_enabled)
            self._given[id(context)] = context, (device_type, dtype, enabled, cache_enabled)

        return replaced([(torch.autocast, "__init__", made)])

    def _autocast_options(self, context: Any) -> tuple[Any, ...]:
        """Return what an autocast was made with; None means what is in force when it is entered."""
        if id(context) in self._given:
            return self._given[id(context)][1]
        return autocast_options(context)

    def _query(self, name: str, what: str) -> Callable[..., Any]:
        original = getattr(torch, name)

        def query(*args: Any) -> Any:
            site = CallSite.of_caller()
            is_ours = self.is_switching or site.is_of_torch or site.is_of_capture
            if not is_ours and self._current() is not None:
                self._try(self._stop, f"asks {what}, which is not known before the graph runs")
            return original(*args)

        return query

    def _try(self, note: Callable[..., None], *args: Any, **options: Any) -> None:
        try:
            note(*args, **options)
        except BaseException as found:
            if self._give_up is None:
                raise
            self._give_up(found)

    @contextmanager
    def _switching(self) -> Iterator[bool]:
        before, self.is_switching = self.is_switching, True
        try:
            yield before
        finally:
            self.is_switching = before


def _is_symbolic(context: Any) -> bool:
    """Whether a context switches gradients by a value that is known only when the graph runs."""
    return isinstance(getattr(context, "mode", None), Proxy)
