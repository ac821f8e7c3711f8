"""Passes that put an operator between a weight and the layers that use it."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from biofx.errors import OptionError
from biofx.layers.lowering import Lowering
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import Sites, Weight, WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.rewriting.pass_base import Pass, Scope
from biofx.rewriting.report import Remark, missed


@dataclass(frozen=True, kw_only=True)
class WeightPass(Pass):
    """A pass over weights: a weight is wrapped once, however many of its uses are selected."""

    def survey(self, graph_module: BioGraphModule, scope: Scope) -> Any:
        """Return what :meth:`reason_against` must know of the graph as it was before the pass."""
        return None

    def show(self, graph_module: BioGraphModule, scope: Scope) -> None:
        """Make visible what the pass acts on besides weights."""
        return

    def candidates(self, sites: Sites, scope: Scope) -> list[Weight]:
        """Return the weights that the pass may act on."""
        return sites.weights()

    @abstractmethod
    def reason_against(self, site: WeightSite, survey: Any) -> str | None:
        """Return why a selected site is left alone, None if it is not."""

    def asked_at(self, site: WeightSite, survey: Any) -> dict[str, Any]:
        """Return details for a site that is left alone; ``asked_as`` is what an option calls it."""
        return {}

    def prepare(self, lowering: Lowering, weights: list[Weight], survey: Any, scope: Scope) -> None:
        """Do what must be done before the first of the weights is wrapped."""

    @abstractmethod
    def wrap(self, lowering: Lowering, weight: Weight, survey: Any) -> Iterator[Remark]:
        """Wrap a weight for the uses it comes with, and say so of each."""

    def finish(
        self, lowering: Lowering, weights: list[Weight], survey: Any, scope: Scope
    ) -> Iterator[Remark]:
        """Do what can only be done once all weights are wrapped, and say so."""
        return iter(())

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Wrap each selected weight.

        Raises:
            OptionError: two uses of one weight are given different options.
        """
        before = set(graph_module.graph.nodes)
        self.show(graph_module, scope)
        for node in graph_module.graph.nodes:
            if node not in before and node.users:
                scope.let_stand_for(node, next(iter(node.users)))
        sites = find_sites(graph_module)
        survey, lowering = self.survey(graph_module, scope), Lowering(graph_module)
        chosen: list[tuple[WeightPass, Weight]] = []
        for weight in self.candidates(sites, scope):
            taken: list[WeightSite] = []
            options_taken: WeightPass = self
            for site in weight.sites:
                options = scope.options(self, site.node, site.layer)
                reason = options if isinstance(options, str) else options.reason_against(site, survey)
                if isinstance(options, str) or reason is not None:
                    details = {} if isinstance(options, str) else options.asked_at(site, survey)
                    yield missed(site.node, site.layer, site.told(str(reason)), **details)
                    continue
                if taken and options != options_taken:
                    raise OptionError(
                        f"{self.name}: the uses of {weight.path!r} are given different options, "
                        f"{options_taken} and {options}, but a weight has one state; select them alike, or "
                        "only one of them"
                    )
                options_taken = options
                taken.append(site)
            if taken:
                chosen.append((options_taken, dataclasses.replace(weight, sites=tuple(taken))))
        weights = [weight for _, weight in chosen]
        self.prepare(lowering, weights, survey, scope)
        for options, weight in chosen:
            yield from options.wrap(lowering, weight, survey)
        yield from self.finish(lowering, weights, survey, scope)
        for bystander in sites.bystanders:
            yield missed(bystander.node, bystander.layer, bystander.reason)
