"""Runs of a model that were observed: which value went where, through everything that Python ran.

Where Python decides, the graphs of a model do not say which of them feeds which. One run on example inputs
does: loops appear as often as they ran, containers and caches are looked through, and modules with an eager
forward are part of it. Such a graph is for analysis alone and is never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule

from biofx.graph.observed_functions import SHAPE
from biofx.graph.regions import OBSERVED
from biofx.model.copies import pack, unpack

ATTRIBUTE = "observed_runs"
"""Attribute of a captured model that holds its observed runs."""
INDICES = "observed_indices"
"""The key in the ``meta`` of nodes of observed runs under which the values of index tensors lie, by the names
of their nodes; the shape of a value lies under :data:`~biofx.graph.observed_functions.SHAPE`."""


@dataclass(frozen=True)
class ObservedRuns:
    """The graphs of the runs, the first of the example itself; no graph where no run could be observed."""

    graphs: tuple[Graph, ...]
    reason: str = ""
    """Why there is none, or why there is only one."""
    is_traced: bool = False
    """Whether they are traces without an example, in which loops run a few times."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ObservedRuns:
        return self  # nothing changes them

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (tuple(map(_packed, self.graphs)), self.reason, self.is_traced)


def _packed(graph: Graph) -> tuple[Any, ...]:
    return pack(graph, (SHAPE, INDICES))


def _unpickled(packed: tuple[tuple[Any, ...], ...], reason: str, is_traced: bool) -> ObservedRuns:
    return ObservedRuns(tuple(map(unpack, packed)), reason, is_traced)


def observed_runs_of(graph_module: GraphModule) -> ObservedRuns:
    """Return the observed runs of a model; none of a model whose graph says it all."""
    if OBSERVED in vars(graph_module):
        return ObservedRuns(())
    found: ObservedRuns = vars(graph_module).get(ATTRIBUTE, ObservedRuns(()))
    return found


def observed_view(graph_module: GraphModule, graph: Graph) -> GraphModule:
    """Return a view of a model whose graph is an observed run; it shares the modules of the model."""
    view: GraphModule = object.__new__(type(graph_module))
    vars(view).update(vars(graph_module))
    vars(view).update({"_graph": graph, OBSERVED: True})
    return view
