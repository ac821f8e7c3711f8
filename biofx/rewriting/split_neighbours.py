"""Neighbouring output channels as the synapses of a connection: sums of their outputs, and their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from biofx.callables import identity
from biofx.graph.printing import function_name
from biofx.layers.layer_kind import argument
from biofx.layers.lowering import Lowering
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.split_ops import level_gradient, pool_synapses
from biofx.plasticity.model_states import state_of
from biofx.rewriting.activation import insert_activation
from biofx.rewriting.folding import Fold, FoldPlan
from biofx.rewriting.remarks import Exempt, Remark, applied, missed
from biofx.rewriting.scope import Scope
from biofx.rewriting.weight_pass import LayerUse


@dataclass(frozen=True)
class SplittableLayer(LayerUse):
    """A layer whose output channels may be summed."""

    is_split: bool
    """Whether its output is split already."""
    reason: str | None
    """Why it cannot be split, whatever the options; None if it can."""


def why_not_neighbours(
    site: WeightSite, graph_module: BioGraphModule, readout: Set[Node], in_doubt: Mapping[Node, str]
) -> str | None:
    """Return why the channels of a layer cannot be summed, whatever the options; None if they can.

    Args:
        site: of the layer's weight.
        graph_module: the model.
        readout: the nodes with no weights between them and the model's output.
        in_doubt: the module in Python that decides whether a node is one of these.
    """
    if site.kind.why_no_units:
        return Exempt(site.kind.why_no_units)
    if not site.parameter.numel():
        return site.lowering_blocker or "it has no weights"
    if site.why_no_channels is not None:
        return f"{site.why_no_channels}; only those of a Linear or a convolution are split"
    if getattr(graph_module.get_submodule(site.layer), "last_module_token", False):
        return Exempt("it is marked as the last module")
    if not site.node.users:
        return "nothing reads its output"
    if (region := in_doubt.get(site.node)) is not None:
        return f"whether it is an output layer is not known: Python calls {region!r} and what follows it"
    if site.node in readout:
        return Exempt("it is an output layer: no weights between it and the model's output")
    return None


def pool_neighbours(site: WeightSite, gamma: int, activation: Callable[[Any], Any] | str) -> Remark:
    """Sum groups of ``gamma`` neighbouring output channels behind an activation, and say so."""
    users = list(site.node.users)
    activated = insert_activation(site, activation)
    with site.node.graph.inserting_after(activated):
        pooled = site.node.graph.create_node(
            "call_function",
            pool_synapses,
            (activated,),
            {"gamma": gamma, "channel_axis": site.kind.channel_axis},
            f"{site.node.name}_pooled",
        )
    pooled.meta = {key: value for key, value in site.node.meta.items() if key == "nn_module_stack"}
    for user in users:
        user.replace_input_with(site.node, pooled)
    groups = site.output_channels // gamma
    described = "" if activation is identity else f" after {function_name(activation)}"
    message = f"{groups} groups of {gamma} of its {site.output_channels} output channels summed{described}"
    return applied(site.node, site.layer, message, groups=groups, gamma=gamma, channels=site.output_channels)


def with_steps(
    graph_module: BioGraphModule, remarks: Iterable[Remark], pools: Sequence[Node], levelled: Sequence[Node]
) -> Iterator[Remark]:
    """Yield remarks that also say how wide layers are once deployed, and how large their steps.

    Deployed, a weight is the sum over the synapses among a layer's outputs, its inputs, or both, of which
    each receives the gradient of the sum: a step of gradient descent is as many times that of a plain layer.

    Args:
        graph_module: the model, split.
        remarks: on its layers.
        pools: the new sums of synapses whose gradients are not divided.
        levelled: those whose gradients will be.
    """
    folds, larger = (
        _folds_by_name(graph_module, among) if among else {} for among in ((*pools, *levelled), pools)
    )
    for remark in remarks:
        said, details = [], dict(remark.details)
        if (fold := folds.get(remark.node or "")) is not None and fold.rows > 1:
            said.append(f"deployed, {details['groups']} channels")
        if (fold := larger.get(remark.node or "")) is not None:
            details["step"] = fold.rows * fold.columns
            reads = "" if said else f", since it reads sums of {fold.columns}"
            said.append(f"for equal rates {details['step']} times the step of a plain layer{reads}")
        yield replace(remark.with_note(" and ".join(said)), details=details)


def _folds_by_name(graph_module: BioGraphModule, pools: Iterable[Node]) -> dict[str, Fold]:
    plan = FoldPlan(graph_module, find_sites(graph_module), {}, frozenset(pools))
    return {node.name: fold for node, fold in plan.folds.items()}


def level_steps(graph_module: BioGraphModule, scope: Scope, pools: Iterable[Node]) -> Iterator[Remark]:
    """Divide gradients so that the layers of the deployed model take the steps of plain layers.

    Deployed, a weight is the sum over the synapses of its connection, among a layer's outputs, its inputs,
    or both. Each of them receives the gradient of the sum, so for equal rates the sum takes as large a step
    as all of them together. Divided by their number, the gradients make the sum's step that of one weight.

    Args:
        graph_module: the model, split; rewritten in place.
        scope: what the pass may touch.
        pools: the sums of synapses whose steps are to be levelled.

    Yields:
        A remark for each layer whose weights are summed.
    """
    sites = find_sites(graph_module)
    folds = FoldPlan(graph_module, sites, {}, frozenset(pools)).folds
    lowering = Lowering(graph_module)
    for weight in sites.weights():
        found = {
            site.node: (folds[site.node].rows, folds[site.node].columns)
            for site in weight.sites
            if site.node in folds
        }
        if not found:
            continue
        first = weight.sites[0]
        if len(found) < len(weight.sites) or len(set(found.values())) > 1:
            reason = "gradients not divided: its uses are summed over different numbers of synapses"
            yield from (missed(site.node, site.layer, reason) for site in weight.sites)
            continue
        rows, columns = next(iter(found.values()))
        with scope.rewriting(first.node):
            for site in weight.sites:
                lowering.lower(site)
            lowering.wrap_weight(weight.sites, level_gradient, None, "levelled", rate=1 / (rows * columns))
            if rows > 1:
                _level_biases(weight.sites, lowering, 1 / rows)
        state_of(graph_module, weight).gradient_level /= rows * columns
        what = " and ".join(
            f"{count} {side}" for count, side in ((rows, "outputs"), (columns, "inputs")) if count > 1
        )
        message = f"gradients divided by {rows * columns}: sums over {what} take the step of one weight"
        yield from (
            applied(s.node, s.layer, s.describe(message), rows=rows, columns=columns) for s in weight.sites
        )


def _level_biases(sites: Iterable[WeightSite], lowering: Lowering, rate: float) -> None:
    """Multiply the gradients of the biases of some layers."""
    made: dict[tuple[Node, Node | None], Node] = {}
    for site in sites:
        bias, context = argument(site.node, 2, "bias"), lowering.contexts.around(site.node)
        if not isinstance(bias, Node):
            continue
        if (bias, context) not in made:
            with bias.graph.inserting_before(lowering.contexts.place_for(site.node, (bias,))):
                levelled = bias.graph.create_node(
                    "call_function", level_gradient, (bias,), {"rate": rate}, f"{bias.name}_levelled"
                )
            levelled.meta = dict(bias.meta)
            made[bias, context] = levelled
        site.node.replace_input_with(bias, made[bias, context])
