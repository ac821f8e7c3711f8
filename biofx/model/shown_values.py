"""A second form of a graph's forward, which shows some of its values to whoever listens.

While nobody listens, the graph runs as ever. The graph itself, what the module holds and its copies are not
changed: the second form is a function beside the first one, on the class that a graph module has for itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol

from torch import nn
from torch.fx import GraphModule, Node

from biofx.graph.contexts import restoring_modes
from biofx.model.copies import copy_graph


class Listener(Protocol):
    """Sees values of a graph while its module is in training; only a weak reference to it is kept."""

    def see(self, key: Any, value: object) -> None:
        """Take note of a value, before anything else can change it."""


Find = Callable[[GraphModule], Mapping[Node, Iterable[Hashable]]]
"""Returns which nodes of a graph are shown, and under which keys."""


class ShownValues:
    """What is shown of a graph, and to whom; the code is that of the graph as it is now.

    Args:
        graph_module: the module.
        shown: the nodes, and the keys under which each is shown.
    """

    def __init__(self, graph_module: GraphModule, shown: Mapping[Node, Iterable[Hashable]]) -> None:
        self.listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        graph = copy_graph(graph_module.graph)
        keys = {node.name: tuple(given) for node, given in shown.items()}
        for node in list(graph.nodes):
            if node.name in keys:
                with graph.inserting_after(node):
                    graph.call_function(self._shower(keys[node.name]), (node,))
        holder = GraphModule.__new__(GraphModule)  # of the class that it gets for itself, with nothing in it
        nn.Module.__init__(holder)
        holder.graph = graph
        self.forward: Callable[..., Any] = restoring_modes(graph, type(holder).forward)

    def _shower(self, keys: tuple[Hashable, ...]) -> Callable[[object], None]:
        def shown(value: object) -> None:
            for listener in self.listeners:
                for key in keys:
                    listener.see(key, value)

        return shown


def listen(graph_module: Any, find: Find, listener: Listener) -> None:
    """Show values of a graph to a listener, from the next forward in training on.

    Where the graph is changed, or generated anew, nothing is shown any more until this is called again.

    Args:
        graph_module: with a graph of its own.
        find: says what is shown, to all listeners; called where nobody has listened to this graph before.
        listener: is asked to see the values.
    """
    kind = type(graph_module)
    if kind._shown is None:
        kind._shown = ShownValues(graph_module, find(graph_module))
    kind._shown.listeners.add(listener)


def stop_listening(graph_module: Any, listener: Listener) -> None:
    """Show nothing of a graph to a listener any more; nothing happens if nothing was."""
    shown: ShownValues | None = type(graph_module)._shown
    if shown is not None:
        shown.listeners.discard(listener)
