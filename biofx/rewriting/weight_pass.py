"""Candidates of passes over layers, and passes that put an operator between a weight and its layers."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.fx import Node

from biofx.analysis.observation import find_all_sites
from biofx.errors import OptionError
from biofx.graph.analysis_cache import unchanged
from biofx.layers.lowering import Lowering
from biofx.layers.norms import NormSite, find_norms, lower_norm
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import Sites, Weight, WeightSite, weight_blocker
from biofx.model.graph_module import BioGraphModule
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.remarks import Remark, missed, switched_off
from biofx.rewriting.scope import Scope

WeightPassT = TypeVar("WeightPassT", bound="WeightPass")


@dataclass(frozen=True)
class LayerUse:
    """A candidate of a pass over layers; subclasses add what an analysis says of the layer."""

    site: WeightSite

    @property
    def node(self) -> Node:
        """The node that computes the layer's output."""
        return self.site.node

    @property
    def layer(self) -> str:
        """Path of the layer."""
        return self.site.layer


@dataclass(frozen=True)
class WeightUses:
    """A candidate of a pass over weights."""

    weight: Weight
    """The weight, with those of its uses that the pass may rewrite."""
    lowering: Lowering
    """Makes the weight visible, and inserts operators behind it."""
    survey: Any
    """What :meth:`WeightPass.survey` returned."""

    @property
    def node(self) -> Node:
        """The node of the first use."""
        return self.weight.sites[0].node

    @property
    def layer(self) -> str:
        """Path of the layer of the first use."""
        return self.weight.sites[0].layer


def unsupported(sites: Sites) -> Iterator[Remark]:
    """Yield a remark for each layer that no pass over layers can reach, with the reason."""
    for layer in sites.unsupported:
        yield missed(layer.node, layer.layer, layer.reason)


IsMeant = Callable[[Node, str], bool]
"""Whether a pass is meant for all parameters that a node reads; called with it and the path of its layer."""


def show_parameters(graph_module: BioGraphModule, scope: Scope, is_meant: IsMeant) -> None:
    """Replace calls of layers and normalisations by functions, so that the graph reads all their parameters.

    Done for what is selected, meant and can be lowered, where a parameter is trainable and has values.

    Args:
        graph_module: the graph, rewritten in place.
        scope: what the pass may touch.
        is_meant: asked of nodes that call a module.
    """
    lowering = Lowering(graph_module)

    def is_shown(site: WeightSite | NormSite) -> bool:
        if site.node.op != "call_module" or scope.why_not(site.node, site.layer) is not None:
            return False
        held = graph_module.get_submodule(str(site.node.target)).parameters()
        trained = (entry for entry in held if entry.requires_grad and not entry.is_meta)
        return is_meant(site.node, site.layer) and any(weight_blocker(entry) is None for entry in trained)

    for site in find_sites(graph_module).found:
        if site.lowering_blocker is None and is_shown(site):
            with scope.rewriting(site.node):
                lowering.lower(site)
    for norm in find_norms(graph_module):
        if norm.lowering_blocker is None and is_shown(norm):
            with scope.rewriting(norm.node):
                lower_norm(lowering, norm)


def weights_and_parameters(sites: Sites, is_meant: IsMeant) -> list[Weight]:
    """Return the weights with whatever else reads them, and the other parameters that a pass is meant for."""
    known = {id(weight.parameter) for weight in sites.weights_and_reads(directly=False)}
    return [
        weight
        for weight in sites.weights_and_reads(directly=True)
        if id(weight.parameter) in known or any(is_meant(site.node, site.layer) for site in weight.sites)
    ]


@dataclass(frozen=True, kw_only=True)
class WeightPass(Pass):
    """A pass over weights: a weight is rewritten once, for those of its uses that are selected.

    A subclass implements :meth:`reason_against` and :meth:`rewrite_node`, which gets a :class:`WeightUses`
    and returns a remark for each use.
    """

    def survey(self, graph_module: BioGraphModule, scope: Scope) -> Any:
        """Return what the pass must know of the graph as it is before the first weight is rewritten."""
        return None

    def weights(self, sites: Sites, scope: Scope) -> Iterable[Weight]:
        """Return the weights that the pass may rewrite, each with all of its uses."""
        return sites.weights()

    @abstractmethod
    def reason_against(self, site: WeightSite, survey: Any) -> Remark | None:
        """Return a remark on why a selected use is left alone, None if it is rewritten."""

    def rewrite(self, graph_module: BioGraphModule, scope: Scope) -> Iterator[Remark]:
        """Rewrite each selected weight.

        Raises:
            OptionError: two uses of one weight are given different options.
        """
        with unchanged():
            sites = find_all_sites(graph_module)
            survey, lowering = self.survey(graph_module, scope), Lowering(graph_module)
        chosen = yield from self.choose(sites, scope, survey, lowering)
        yield from self.rewrite_chosen(chosen, scope)
        yield from unsupported(sites)

    def choose(
        self: WeightPassT, sites: Sites, scope: Scope, survey: Any, lowering: Lowering
    ) -> Generator[Remark, None, list[tuple[WeightPassT, WeightUses]]]:
        """Yield a remark for each use that is left alone; return the weights, and the options for each.

        Raises:
            OptionError: two uses of one weight are given different options.
        """
        chosen = []
        for weight in self.weights(sites, scope):
            uses: list[WeightSite] = []
            options = self
            for site in weight.sites:
                remark = self.remark_against(site, scope, survey)
                if remark is not None:
                    yield dataclasses.replace(remark, message=site.describe(remark.message))
                    continue
                own = scope.variant(self, site.node, site.layer)
                if uses and own != options:
                    raise OptionError(
                        f"{self.name}: the uses of {weight.path!r} are given different options, {options} "
                        f"and {own}, but a weight has one state; select them alike, or only one of them"
                    )
                options = own
                uses.append(site)
            if uses:
                taken = dataclasses.replace(weight, sites=tuple(uses))
                chosen.append((options, WeightUses(taken, lowering, survey)))
        return chosen

    def remark_against(self, site: WeightSite, scope: Scope, survey: Any) -> Remark | None:
        """Return a remark on why a use is left alone, selected or not; None if it is rewritten."""
        reason = scope.why_not(site.node, site.layer)
        if reason is not None:
            return switched_off(site.node, site.layer, reason)
        return scope.variant(self, site.node, site.layer).reason_against(site, survey)

    def rewrite_chosen(
        self: WeightPassT, chosen: Iterable[tuple[WeightPassT, WeightUses]], scope: Scope
    ) -> Iterator[Remark]:
        """Rewrite the weights that :meth:`choose` returned, and yield a remark for each use."""
        for options, uses in chosen:
            with scope.rewriting(uses.node):
                remarks = options.rewrite_node(uses, options)
                remarks = [remarks] if isinstance(remarks, Remark) else list(remarks)
            yield from remarks
