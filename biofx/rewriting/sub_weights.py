"""Sub-weights as the synapses of a connection: a layer reads the sum of several weights in place of one.

Behind an activation that is not the identity, each sub-weight has a call of the layer to itself:
``y = sum of activation(layer(x, W_i)) + bias``. The bias is the unit's own and is added once, to the sum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import Node

from biofx.analysis.readouts import readout_nodes
from biofx.callables import identity
from biofx.errors import OptionError
from biofx.graph.printing import function_name
from biofx.layers.layer_kind import argument
from biofx.layers.lowering import Lowering, node_stem
from biofx.layers.single_weight import DENSE_KINDS
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import Weight, WeightSite, sum_behind
from biofx.model.graph_module import BioGraphModule
from biofx.operators.split_ops import level_gradient, sum_sub_weights
from biofx.plasticity.model_states import bio_module_at, is_taken, state_of
from biofx.plasticity.sub_weights import add_sub_weights, shared_out
from biofx.rewriting.activation import insert_activation
from biofx.rewriting.remarks import Remark, applied, done_already, missed
from biofx.rewriting.scope import Scope

Activation = Callable[[Any], Any] | str


SUB_WEIGHTS = "sub-weights"
"""The mode of weight splitting in which synapses are sub-weights."""


class SubWeightOptions(Protocol):
    """How a weight is shared out among sub-weights."""

    @property
    def gamma(self) -> int:
        """Sub-weights, a count >= 2."""

    @property
    def activation(self) -> Activation:
        """What acts on each sub-synapse before the sum."""

    @property
    def rates(self) -> str:
        """One of :data:`~biofx.operators.split_ops.SPLITTING_RATES`."""

    @property
    def seed(self) -> int:
        """From which the shares are sampled."""


def share_out_weights(
    graph_module: BioGraphModule, scope: Scope, options_at: Callable[[Node, str], SubWeightOptions | None]
) -> Iterator[Remark]:
    """Put sub-weights in the place of weights, and yield a remark for each use of one that is meant.

    Args:
        graph_module: the model, rewritten in place.
        scope: what the pass may touch.
        options_at: returns the options for a layer by its node and path, None where it is not meant.

    Raises:
        OptionError: two uses of one weight are given different options.
    """
    readout, lowering = readout_nodes(graph_module), Lowering(graph_module)

    def is_last(site: WeightSite) -> bool:
        marked = getattr(graph_module.get_submodule(site.layer), "last_module_token", False)
        return site.node in readout or bool(marked)

    for weight in find_sites(graph_module).weights():
        given = {site: options_at(site.node, site.layer) for site in weight.sites if not site.is_further}
        meant = [(site, options) for site, options in given.items() if options is not None]
        if not meant:
            continue
        first, options = meant[0]
        other = next((own for _, own in meant if own != options), None)
        if other is not None:
            raise OptionError(
                f"{weight.path!r}: its uses are given different options, {options} and {other}, but a weight "
                "is shared out once; give them the same"
            )
        reasons = [
            remark
            for site, own in given.items()
            if (remark := _why_not(site, options, is_last=is_last(site), is_meant=own is not None))
        ]
        if reasons:
            for site, _ in meant:
                why, elsewhere = reasons[0], reasons[0].node != site.node.name
                message = (
                    f"its weight is read by {why.node!r} too: {why.message}" if elsewhere else why.message
                )
                yield dataclasses.replace(why, node=site.node.name, layer=site.layer, message=message)
            continue
        with scope.rewriting(first.node):
            remarks = list(_share_out(weight, lowering, options))
        yield from remarks


def is_linear(activation: Activation) -> bool:
    """Whether an activation is the identity, so that sums of outputs are outputs of sums."""
    return activation is identity or type(activation) is nn.Identity or isinstance(activation, str)


def _why_not(site: WeightSite, options: SubWeightOptions, *, is_last: bool, is_meant: bool) -> Remark | None:
    """Return a remark on why a use keeps its weight from being shared out, None if it does not."""
    if sum_behind(site.whole_weight_node) is not None or site.whole_path != site.parameter_path:
        return done_already(site.node, site.layer, "its weight is the sum of sub-weights already")
    reason = _reason_against(site)
    if reason is None and not is_meant:
        reason = f"its use at {site.node.name!r} is not to have sub-weights, and would read one of them alone"
    if reason is None and not is_linear(options.activation):
        reason = _why_linear(site, is_last=is_last)
    return None if reason is None else missed(site.node, site.layer, site.describe(reason))


def _reason_against(site: WeightSite) -> str | None:
    if site.kind.why_no_units:
        return site.kind.why_no_units
    if site.computation is not None:
        return f"the forward computes its weight ({site.computation.words}), and a parameter has sub-weights"
    if site.parameter.is_meta:
        return "its weight is on the meta device and has no values"
    if is_taken(site.parameter_path):
        return f"plasticity states use its name, {site.parameter_path!r}, for something else"
    if site.value_blocker is not None:
        return site.value_blocker
    if not site.parameter.requires_grad:
        return "its weight is frozen (requires_grad is False), and sub-weights would never differ from it"
    if site.operators:
        return "its weight is constrained or scaled already, and sub-weights come before that"
    return None


def _why_linear(site: WeightSite, *, is_last: bool) -> str | None:
    """Return why an activation cannot act on each sub-synapse of a layer, None if it can."""
    if site.kind not in DENSE_KINDS:
        return f"{site.kind.name} does not show what each sub-weight transmits, for an activation to act on"
    if is_last:
        return "it is an output layer, whose outputs an activation would change"
    return None


def _share_out(weight: Weight, lowering: Lowering, options: SubWeightOptions) -> Iterator[Remark]:
    """Put sub-weights in the place of a weight, and yield a remark for each of its uses."""
    gamma, activation = options.gamma, options.activation
    graph_module = lowering.graph_module
    state = state_of(graph_module, weight)
    first, *others = shared_out(weight.parameter.detach(), gamma, options.seed, weight.path)
    lowering.parameters.replace(weight.parameter, first)
    further = add_sub_weights(graph_module, state, others, options.seed)
    for site in weight.sites:
        lowering.lower(site)
    message = f"{gamma} sub-weights add up to its weight"
    if is_linear(activation):
        lowering.wrap_weight(
            weight.sites,
            sum_sub_weights,
            functools.partial(_read_all, lowering, further),
            "summed",
        )
        readers = [weight.sites]
    else:
        calls = [_call_for_each(site, further, lowering, activation) for site in weight.sites]
        readers = list(zip(*calls, strict=True))
        message += f", their outputs are summed after {function_name(activation)}"
    if options.rates == "mean":
        for sites in readers:
            lowering.wrap_weight(sites, level_gradient, None, "levelled", rate=1 / gamma)
        for path in (weight.path, *further):
            bio_module_at(graph_module, path).gradient_level /= gamma
        step = f"; gradients divided by {gamma}: their sum takes the step of one weight"
    else:
        step = f"; for equal rates their sum takes {gamma} times the step of one weight"
    for site in weight.sites:
        yield applied(site.node, site.layer, site.describe(message + step), gamma=gamma)


def _read_all(lowering: Lowering, paths: list[str], node: Node, _: str) -> tuple[Node, ...]:
    """Return nodes that read parameters, behind a node."""
    place = node.next
    return tuple(lowering.read(path, place, node_stem(path)) for path in paths)


def _call_for_each(
    site: WeightSite, further: list[str], lowering: Lowering, activation: Activation
) -> list[WeightSite]:
    """Give each sub-weight a call of a lowered layer to itself; return the sites of all.

    The calls have no bias; their activated outputs are added up, and then the bias is added.
    """
    node, users = site.node, list(site.node.users)
    graph, stack = node.graph, {key: value for key, value in node.meta.items() if key == "nn_module_stack"}
    bias = argument(node, 2, "bias")
    node.args = (*node.args[:2], *(() if len(node.args) < 4 else (None,)), *node.args[3:])
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "bias"}
    sites, total = [site], insert_activation(site, activation)

    def add(name: str, target: Any, *args: Any) -> Node:
        op = "call_method" if isinstance(target, str) else "call_function"
        with graph.inserting_after(last):
            made = graph.create_node(op, target, args, name=name)
        made.meta = dict(stack)
        return made

    last = total
    for number, path in enumerate(further, 2):
        read = lowering.read(path, node, node_stem(path))
        call = add(f"{node.name}_{number}", node.target)
        call.args, call.kwargs = node.args, node.kwargs
        site.slot.write(call, read)
        sites.append(dataclasses.replace(site, node=call, parameter_path=path))
        last = insert_activation(sites[-1], activation)
        total = last = add(f"{node.name}_summed", torch.add, total, last)
    if isinstance(bias, Node):
        if site.kind.kernel_axes:
            bias = last = add(f"{node.name}_bias", "reshape", bias, (-1, *[1] * site.kind.kernel_axes))
        total = add(f"{node.name}_biased", torch.add, total, bias)
    for user in users:
        user.replace_input_with(node, total)
    return sites
