"""Sees the activity of each layer's units while a model trains, at the steps that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from biofx.analysis.synapses import unit_output
from biofx.diagnostics.unit_activity import SeenActivity, UnitActivity
from biofx.graph.regions import joined_path, region_paths
from biofx.layers.sites import find_sites
from biofx.model.graph_module import BioGraphModule
from biofx.model.shown_values import listen, stop_listening
from biofx.operators.dispatch import is_plain_eager
from biofx.operators.rate_ops import is_recomputed


class ActivityWatch:
    """Sees the units of every layer of a model where its graphs compute them, behind their nonlinearity.

    Forwards in evaluation are not seen, nor what is compiled, exported or transformed by ``torch.func``, nor
    what checkpointing computes for the second time.

    Args:
        model: a rewritten model.
        rank_samples: samples kept of each layer for the ranks, a count.
    """

    def __init__(self, model: nn.Module, rank_samples: int) -> None:
        self._listening = [(graph, _Listener(path, self._see)) for path, graph in _graphs(model)]
        self._rank_samples = rank_samples
        self._seen: dict[str, SeenActivity] = {}

    def start(self) -> None:
        """See the forwards from here on; what was seen before stays until it is taken."""
        for graph, listener in self._listening:
            listen(graph, _unit_outputs, listener)

    def stop(self) -> None:
        """Let the graphs run as if nobody had ever seen them."""
        for graph, listener in self._listening:
            stop_listening(graph, listener)

    def take(self, path: str, dormancy: float) -> UnitActivity | None:
        """Return what was seen of a weight's units since it was last taken, and forget it.

        Args:
            path: of the weight.
            dormancy: τ, dimensionless.
        """
        seen = self._seen.pop(path, None)
        return None if seen is None else seen.measure(dormancy)

    def forget(self, path: str) -> None:
        """Forget what was seen of a weight's units."""
        self._seen.pop(path, None)

    def _see(self, path: str, value: Tensor, channel_axis: int) -> None:
        if path not in self._seen:
            self._seen[path] = SeenActivity(self._rank_samples)
        self._seen[path].add(value, channel_axis)


class _Listener:
    """Listens to one graph of a model for a watch."""

    def __init__(self, path: str, see: Any) -> None:
        self._path, self._see = path, see

    def see(self, key: tuple[str, int], value: object) -> None:
        """Pass on the activity of a layer's units."""
        path, channel_axis = key
        if type(value) is Tensor and is_plain_eager() and not is_recomputed():
            self._see(joined_path(self._path, path), value, channel_axis)


def _graphs(model: nn.Module) -> Iterator[tuple[str, BioGraphModule]]:
    """Yield the graphs of a model by their paths: its own, and those of its regions."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in ("", *region_paths(model)):
        graph = modules.get(path)
        if isinstance(graph, BioGraphModule) and not graph.keeps_forward:
            yield path, graph


def _unit_outputs(graph_module: GraphModule) -> Mapping[Node, list[tuple[str, int]]]:
    """Return the nodes with the activity of units, with the paths of weights and the axis of the units."""
    found: dict[Node, list[tuple[str, int]]] = {}
    for site in find_sites(graph_module).found:
        if not site.is_further and site.why_no_channels is None:
            output, _ = unit_output(site.node, graph_module)
            found.setdefault(output, []).append((site.parameter_path, site.kind.channel_axis))
    return found
