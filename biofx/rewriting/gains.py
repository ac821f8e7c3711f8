"""Normalisation between a unit and the weights that read it: a gain below 0 would turn its sign over.

A gain of a batch normalisation that is negative is folded into the layer before it, exactly: with the layer's
output y turned into -y, its running mean m into -m and the gain g into -g, g (y - m) / s + b stays the
same. Then the graph keeps the gain at or above 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from biofx.layers.lowering import Lowering
from biofx.layers.norms import NormSite, find_norms, lower_norm
from biofx.layers.weight_site import WeightSite, sum_behind
from biofx.operators.sign_ops import constrain_sign
from biofx.rewriting.remarks import Remark, applied, done_already, missed, switched_off
from biofx.rewriting.scope import Scope

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_negative_gains(
    lowering: Lowering, norms: set[Node], layers: dict[Node, WeightSite]
) -> dict[str, int]:
    """Fold those negative gains of normalisations that can be folded; the model's function stays the same.

    Args:
        lowering: of the graph.
        norms: the normalisations.
        layers: the layers with one weight, by their nodes.

    Returns:
        How many were folded, counts by the path of the gain.
    """
    uses_of = Counter(id(layer.parameter) for layer in layers.values())
    alone = {node: layer for node, layer in layers.items() if uses_of[id(layer.parameter)] == 1}
    shared = shared_parameters(lowering.graph_module)
    return {
        path: _fold(lowering, sites[0], alone, shared)
        for path, sites in _norms_by_gain(lowering, norms).items()
        if len(sites) == 1 and sites[0].node in norms and sites[0].lowering_blocker is None
    }


def _norms_by_gain(lowering: Lowering, norms: set[Node]) -> dict[str, list[NormSite]]:
    """Return all normalisations by the path of their gain, if any of them is wanted."""
    uses: dict[str, list[NormSite]] = {}
    for site in find_norms(lowering.graph_module) if norms else ():
        uses.setdefault(site.parameter_path, []).append(site)
    return uses


def in_scope(scope: Scope, graph_module: GraphModule, norms: set[Node]) -> set[Node]:
    """Return those of some normalisations that a pass may touch."""
    return {
        site.node
        for site in (find_norms(graph_module) if norms else ())
        if site.node in norms and scope.why_not(site.node, site.layer) is None
    }


def constrain_gains(
    scope: Scope, lowering: Lowering, norms: set[Node], folded: dict[str, int], *, exact: bool
) -> Iterator[Remark]:
    """Keep the gains of normalisations at or above 0, and yield a remark for each.

    Args:
        scope: what the pass may touch.
        lowering: of the graph.
        norms: the normalisations that units with a sign go through.
        folded: how many negative gains were folded away, by the path of the gain.
        exact: leave alone those that still have a negative gain, so that the model's function stays.
    """
    for path, sites in _norms_by_gain(lowering, norms).items():
        gains = sites[0].parameter.detach()
        left = 0 if gains.is_meta else int((gains + sites[0].offset < 0).sum())
        taken = []
        for site in sites:
            remark = _reason_against(scope, site, left if exact else 0) if site.node in norms else None
            if remark is not None:
                yield remark
            elif site.node in norms:
                taken.append(site)
        if not taken:
            continue
        with scope.rewriting(taken[0].node):
            for site in taken:
                lower_norm(lowering, site)
            lowering.wrap_weight(taken, constrain_sign, _ones, "signed", method="project")
        away = folded.get(path, 0)
        for site in taken:
            yield applied(
                site.node,
                site.layer,
                f"gains kept from below 0; {away} negative ones were folded into the layer before, "
                f"{left} are held at 0",
                folded=away,
                wrong=left,
            )


def _reason_against(scope: Scope, site: NormSite, negative: int) -> Remark | None:
    reason = scope.why_not(site.node, site.layer)
    if reason is not None:
        return switched_off(site.node, site.layer, reason)
    weight = site.weight_node
    if weight is not None and weight.target is constrain_sign:
        return done_already(site.node, site.layer, "its gains are constrained already")
    if site.parameter.is_meta:
        reason = "its gains are on the meta device and have no values"
    elif negative:
        reason = f"{negative} of its gains are negative and cannot be folded into the layer before exactly"
    else:
        reason = site.lowering_blocker
    return None if reason is None else missed(site.node, site.layer, reason)


def _ones(weight: Node, stem: str) -> Node:
    with weight.graph.inserting_after(weight):
        return weight.graph.call_function(torch.ones_like, (weight,), name=f"{stem}_up")


def _fold(lowering: Lowering, norm: NormSite, layers: dict[Node, WeightSite], shared: Set[int]) -> int:
    """Turn over the units of the layer before that have a negative gain; return how many.

    ``layers`` are those whose weight is used once, ``shared`` the parameters that are not one layer's alone.
    """
    graph_module = lowering.graph_module
    module = graph_module.get_submodule(norm.layer)
    source = norm.node.args[0] if norm.node.args else None
    layer = layers.get(source) if isinstance(source, Node) else None
    if layer is None or not isinstance(module, _BATCH_NORMS) or norm.parameter.is_meta:
        return 0
    negative = norm.parameter.detach() < 0
    if not negative.any():
        return 0
    if len(layer.node.users) > 1 or layer.operators or layer.value_blocker is not None:
        return 0
    if sum_behind(layer.whole_weight_node) is not None:  # one of several weights, which it would take to turn
        return 0
    if not has_own_bias(graph_module, layer, shared):
        return 0
    turn = torch.where(negative, -1.0, 1.0).to(layer.parameter)
    lowering.parameters.replace(norm.parameter, norm.parameter.detach().abs())
    mean: Tensor | None = module._buffers.get("running_mean")
    if mean is not None:
        mean.mul_(turn.to(mean))
    _turn_over(lowering, layer, turn)
    return int(negative.sum())


def _turn_over(lowering: Lowering, layer: WeightSite, turn: Tensor) -> None:
    """Multiply the outputs of a layer by +1 or -1, in its weight and bias."""
    weight = layer.parameter.detach()
    if layer.kind.transposed:
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        turned = grouped * turn.reshape(layer.groups, 1, -1, *(1,) * layer.kind.kernel_axes)
        lowering.parameters.replace(layer.parameter, turned.reshape(weight.shape))
    else:
        lowering.parameters.replace(layer.parameter, weight * turn.reshape(-1, *(1,) * (weight.dim() - 1)))
    bias = _bias_of(lowering.graph_module, layer)
    if bias is not None:
        lowering.parameters.replace(bias, bias.detach() * turn)


def _bias_of(graph_module: nn.Module, layer: WeightSite) -> nn.Parameter | None:
    return graph_module.get_submodule(layer.layer)._parameters.get("bias")


def has_own_bias(graph_module: nn.Module, layer: WeightSite, shared: Set[int]) -> bool:
    """Whether the bias that a layer adds, if any, is its module's ``bias``, and nothing else has it.

    Args:
        graph_module: the model.
        layer: one use of a weight.
        shared: what :func:`shared_parameters` returns.
    """
    bias = _bias_of(graph_module, layer)
    if layer.node.op != "call_module":
        given = layer.node.args[2] if len(layer.node.args) > 2 else layer.node.kwargs.get("bias")
        if (given is None) != (bias is None):
            return False
        if isinstance(given, Node) and (given.op != "get_attr" or given.target != f"{layer.layer}.bias"):
            return False
    return bias is None or id(bias) not in shared


def shared_parameters(graph_module: GraphModule) -> set[int]:
    """Return the identities of the parameters that several modules have, or several nodes read."""
    reads = Counter(id(value) for module in graph_module.modules() for value in module._parameters.values())
    paths = {path: id(value) for path, value in graph_module.named_parameters(remove_duplicate=False)}
    called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        known = paths.get(str(node.target))
        if known is not None:
            # a module that is called reads it besides
            is_called = str(node.target).rpartition(".")[0] in called
            reads[known] += max(0, len(node.users) - 1) + is_called
    return {known for known, count in reads.items() if count > 1}
