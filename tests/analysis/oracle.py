"""The oracle of these tests: what moves at the readers when one channel of a producer is pushed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

import biofx
from biofx.analysis.observed_units import ObservedUnitAnalysis
from biofx.capture.run_observer import observe_run
from biofx.layers.sites import find_sites
from biofx.model.observed_runs import observed_view


class _BetweenLayers(Interpreter):
    """Runs a graph whose layers give out what they are told to, and remembers what they are given."""

    def __init__(self, graph_module: biofx.BioGraphModule, told: dict[Node, Tensor]) -> None:
        super().__init__(graph_module)
        self._told = told
        self._sites = {site.node: site for site in find_sites(graph_module).found}
        self.read: dict[Node, Tensor] = {}
        self.made: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        site = self._sites.get(n)
        if site is None:
            return super().run_node(n)
        self.read[n] = _channels_first(self.env[n.all_input_nodes[0]], site.kind.channel_axis).clone()
        self.made[n] = self._told[n] if n in self._told else super().run_node(n)
        return self.made[n].clone()  # what follows may write to it


def _channels_first(value: Tensor, axis: int) -> Tensor:
    return value.movedim(axis, 0).flatten(1)


def observed_groups(model: torch.nn.Module, x: Tensor) -> biofx.analysis.UnitGroups:
    """Return the units of a model as a run on ``x`` shows them."""
    view = observed_view(biofx.capture(model), observe_run(model, (x,), {}))
    return biofx.analysis.UnitGroups(ObservedUnitAnalysis(view))


def moved_columns(
    model: torch.nn.Module, x: Tensor, *, is_observed: bool = False
) -> tuple[biofx.analysis.UnitGroups, dict[str, list[set[int]]]]:
    """Return the analysis, and for each weight and column the units (by the analysis) that move it.

    Args:
        model: one whose layers have one weight each, called once.
        x: its input, float64.
        is_observed: whether the analysis is that of an observed run.
    """
    graph_module = biofx.capture(model.double().eval())
    sites = {site.node: site for site in find_sites(graph_module).found}
    base = _BetweenLayers(graph_module, {})
    base.run(x)
    groups = observed_groups(model, x) if is_observed else biofx.unit_groups(graph_module)
    moved: dict[str, list[set[int]]] = {
        site.parameter_path: [set() for _ in range(site.input_channels)] for site in sites.values()
    }
    for node, site in sites.items():
        units = groups.representatives(groups.made_by(site.parameter_path)).tolist()
        for row, unit in enumerate(units):
            told = dict(base.made)
            pushed = told[node].clone()
            channel = pushed.select(site.kind.channel_axis, row)
            channel += 1000 + torch.rand(channel.shape, dtype=channel.dtype)
            told[node] = pushed
            run = _BetweenLayers(graph_module, told)
            run.run(x)
            for reader, value in run.read.items():
                changed = (value != base.read[reader]).any(1)
                for column in changed.nonzero().flatten().tolist():
                    moved[sites[reader].parameter_path][column].add(unit)
    return groups, moved


def told_columns(groups: biofx.analysis.UnitGroups) -> dict[str, list[set[int]]]:
    """Return for each weight and column the unit of a layer that the analysis says it reads, if any."""
    made = {int(unit) for path in groups.producers() for unit in groups.representatives(groups.made_by(path))}
    return {
        reading.site.parameter_path: [
            {unit} & made for unit in groups.representatives(reading.units).tolist()
        ]
        for reading in groups.readings
    }


def columns_of(model: torch.nn.Module) -> dict[str, list[str]]:
    """Return for each weight what it reads at each column: ``"layer[output]"`` of the unit's first maker."""
    return columns_in(biofx.unit_groups(biofx.capture(model)))


def columns_in(groups: biofx.analysis.UnitGroups) -> dict[str, list[str]]:
    """Return the same for units that were found."""
    return {reading.site.parameter_path: _names(groups, reading.units) for reading in groups.readings}


def _names(groups: biofx.analysis.UnitGroups, units: Tensor) -> list[str]:
    names = []
    for unit in groups.representatives(units).tolist():
        source = next(s for s in groups.sources if s.first <= unit < s.first + s.count)
        name = source.name.removesuffix(".weight") if source.kind == "layer" else source.kind
        names.append(f"{name}[{unit - source.first}]")
    return names
