"""Contexts that a forward opens (``torch.no_grad``, ``torch.autocast``, …) as pairs of nodes in its graph.

A node begins the context and passes the previous mode to the node that ends it, which restores it. So a
graph starts in the mode of its caller and returns to it, as the Python code does. A node that begins a
context takes an input of the graph, which it does not use: tracing the graph again follows its inputs, and
would otherwise run the switch once instead of recording it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.node import has_side_effect

from biofx.errors import CaptureError
from biofx.torch_private import enter_autocast, exit_autocast, set_grad_enabled


@has_side_effect
def begin_grad_mode(anchor: Any, enabled: bool) -> bool:
    """Switch gradients on or off; return whether they were on.

    Args:
        anchor: any input of the graph; not used.
        enabled: whether gradients are computed from here on.
    """
    if isinstance(anchor, Proxy):
        recorded: bool = _written(anchor, begin_grad_mode, (anchor, enabled))
        return recorded
    before = torch.is_grad_enabled()
    set_grad_enabled(enabled)
    return before


@has_side_effect
def end_grad_mode(before: Any) -> None:
    """Restore what :func:`begin_grad_mode` has returned."""
    if isinstance(before, Proxy):
        _written(before, end_grad_mode, (before,))
    else:
        set_grad_enabled(before)


@has_side_effect
def begin_autocast(
    anchor: Any,
    device_type: str,
    dtype: torch.dtype | None = None,
    enabled: bool = True,
    cache_enabled: bool | None = None,
) -> Any:
    """Enter a ``torch.autocast``; return it.

    Args:
        anchor: any input of the graph; not used.
        device_type: type of the device whose operations are cast, e.g. ``"cuda"``.
        dtype: the dtype to cast to; None for the present one of the device.
        enabled: whether operations are cast.
        cache_enabled: whether casts of weights are cached; None for the present setting.

    Raises:
        CaptureError: the graph is exported in strict mode, which loses autocast.
    """
    if isinstance(anchor, Proxy):
        return _written(anchor, begin_autocast, (anchor, device_type, dtype, enabled, cache_enabled))
    if torch.compiler.is_dynamo_compiling():  # the compiler knows this pair, and no other outside a with
        if torch.compiler.is_exporting():
            raise CaptureError("torch.export loses autocast where it is strict; export with strict=False")
        return enter_autocast(device_type, dtype, enabled, cache_enabled)
    context = torch.autocast(device_type, dtype, enabled, cache_enabled)
    context.__enter__()
    return context


@has_side_effect
def end_autocast(context: Any) -> None:
    """Leave the ``torch.autocast`` that :func:`begin_autocast` has entered."""
    if isinstance(context, Proxy):
        _written(context, end_autocast, (context,))
    elif torch.compiler.is_dynamo_compiling():
        exit_autocast(context)
    else:
        context.__exit__(None, None, None)


BEGINNINGS: dict[Callable[..., Any], Callable[..., Any]] = {
    begin_grad_mode: end_grad_mode,
    begin_autocast: end_autocast,
}
"""Functions that begin a context, and those that end it."""
_ENDS = frozenset(BEGINNINGS.values())


def is_of_a_context(node: Node) -> bool:
    """Whether a node begins or ends a context."""
    return node.target in BEGINNINGS or node.target in _ENDS


def _written(proxy: Proxy, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return proxy.tracer.create_proxy("call_function", function, args, {})


def steers_gradients(graph: Graph) -> bool:
    """Whether contexts in a graph decide where gradients flow."""
    return any(graph.find_nodes(op="call_function", target=begin) for begin in BEGINNINGS)


class ContextMap:
    """The contexts around the nodes of a graph, also around those that are added later."""

    def __init__(self, graph: Graph) -> None:
        self._around: dict[Node, Node | None] = {}
        if not steers_gradients(graph):
            return
        around: list[Node] = []
        for node in graph.nodes:
            if node.target in _ENDS and node.args[0] in around:
                del around[around.index(node.args[0]) :]
            self._around[node] = around[-1] if around else None
            if node.target in BEGINNINGS:
                around.append(node)

    def around(self, node: Node) -> Node | None:
        """Return the node that begins the innermost context around a node, None if it is in none."""
        if not self._around:
            return None
        before = node
        while before.op != "root":
            if before in self._around:
                inside = before is not node and before.target in BEGINNINGS
                return before if inside else self._around[before]
            before = before.prev
        return None

    def place_for(self, reader: Node, inputs: tuple[Node, ...]) -> Node:
        """Return the node before which to insert an expression of some nodes that another node reads.

        It comes after the last of its inputs if that is in the context of the reader, else directly before
        the reader: in another mode it would have another value, or no gradient.
        """
        last = max(inputs)
        return last.next if self.around(last) is self.around(reader) else reader


def restoring_modes(graph: Graph, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that restores the modes of its caller if the graph raises inside a context.

    Args:
        graph: the graph from which the code of the forward is generated.
        forward: the forward of a graph module, with the module as its first argument.
    """
    autocasts = graph.find_nodes(op="call_function", target=begin_autocast)
    if not autocasts and not graph.find_nodes(op="call_function", target=begin_grad_mode):
        return forward
    devices = tuple(dict.fromkeys(str(node.args[1]) for node in autocasts))

    @functools.wraps(forward)
    def restoring(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        before = _Modes.now(devices)
        try:
            return forward(self, *args, **kwargs)
        except BaseException:
            before.restore()
            raise

    return restoring


@contextmanager
def preserved_modes() -> Iterator[None]:
    """Restore gradient mode and autocast at the end of the block."""
    before = _Modes.now(("cpu", "cuda"))
    try:
        yield
    finally:
        before.restore()


@dataclass(frozen=True)
class _Modes:
    """The state that contexts change."""

    gradients: bool
    nesting: int
    cache: bool
    casts: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, devices: tuple[str, ...]) -> _Modes:
        casts = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
        return cls(torch.is_grad_enabled(), autocast_nesting(), torch.is_autocast_cache_enabled(), casts)

    def restore(self) -> None:
        set_grad_enabled(self.gradients)
        while autocast_nesting() > self.nesting:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self.cache)
        for device, enabled, dtype in self.casts:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def autocast_nesting() -> int:
    """Return the number of open autocasts."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return int(depth)
