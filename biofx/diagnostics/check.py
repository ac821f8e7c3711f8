"""Whether a model still is what its passes made of it: ``biofx.check(bio_model)``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from biofx.diagnostics import check_masks, check_signs, check_states
from biofx.diagnostics.audit import Audit, Finding, Subject, Uses, finding, invariant, owner_of
from biofx.errors import InputError
from biofx.graph.joined_graph import whole_graph
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite
from biofx.model.graph_module import BioGraphModule
from biofx.operators.rate_sampling import Distribution
from biofx.operators.split_ops import pool_synapses
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import unwrapped
from biofx.plasticity.ranks import whole_weights
from biofx.random_state import preserved_random_state
from biofx.rewriting.record import TransformStep, record_of


def check(model: nn.Module) -> Audit:
    """Audit every invariant of a transformed or converted model, as it is at this moment.

    No forward is run, nothing is changed, and no random number is drawn; the cost is a few walks over the
    graph and a few passes over the weights. Signs are counted in the weights that layers really use: what the
    graph does to a parameter is computed, whatever it is.

    The bounds of learning-rate factors are those of each layer's config (``bio_mod.config``). What was asked
    for is what the record of the transform says; what is free by default, as the model's inputs and readout
    are of signs, is not missing where the mechanism reached something else.

    Args:
        model: as :func:`biofx.transform`, a pass or :class:`biofx.BioConverter` returned it, wrapped
            (``DistributedDataParallel``, ``torch.compile``) or not. If it is sharded, all ranks must ask
            together, and have room for its weights.

    Returns:
        The audit: ``ok``, ``faults``, ``raise_if_broken()``, counts per layer.

    Raises:
        InputError: biofx did not make the model.

    >>> import biofx
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> bio_model, _ = biofx.transform(model)
    >>> biofx.check(bio_model).ok
    True
    >>> bio_model.get_parameter("2.weight").data[0, :3] = float("nan")
    >>> print(biofx.check(bio_model))
    Sequential: 1 fault (finite)
      2.weight: finite, 3 of 12: 3 of 12 numbers are NaN or infinite; lower the learning rate ...
    """
    plain = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(plain, GraphModule) or not _is_ours(plain):
        raise InputError(
            f"expected a model that biofx made, found a {type(plain).__name__}; transform or convert it "
            "(biofx.transform, biofx.BioConverter), and check what comes out"
        )
    with preserved_random_state(), whole_weights(plain):
        subject = Subject.of(plain)
        findings = tuple(_findings(subject))
    layers = dict.fromkeys([*subject.layers, *(finding.layer for finding in findings if finding.checked)])
    descriptions = {entry.name: entry.description for entry in INVARIANTS}
    return Audit(type(plain).__name__, tuple(layers), descriptions, findings)


def _findings(subject: Subject) -> Iterator[Finding]:
    misfit = _misfit(subject)
    count = len(subject.graph_module.graph.nodes)
    yield Finding("", compiled_graph.name, "", count, int(bool(misfit)), misfit)
    if misfit:  # what such a graph computes is unknown
        return
    uses = Uses.of(subject.graph_module)
    for entry in INVARIANTS:
        yield from entry(subject, uses)


def _misfit(subject: Subject) -> str:
    """Return why a graph does not fit its module, or nothing."""
    try:
        for module in subject.graphs.values():
            module.graph.lint()
    except Exception as error:
        return f"the graph does not fit the model: {error}; transform the model again"
    return ""


def _is_ours(graph_module: GraphModule) -> bool:
    return isinstance(graph_module, BioGraphModule) or any(
        isinstance(module, BioModule) for module in graph_module.modules()
    )


@invariant("graph", "the graph fits the module, and is what the module runs")
def compiled_graph(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find a graph that is not what the module runs."""
    for path, module in subject.graphs.items():
        is_run = module.graph.python_code("self").src == module.code
        own = f"bio_model.get_submodule({path!r})" if path else "bio_model"
        message = f"it was changed and the module runs the old one; call {own}.recompile()"
        yield finding(path, path, 1, int(not is_run), message)


@invariant("splits", "pools of synapses divide their layer's channels, and pool once")
def splits(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find pools of synapses that do not divide the channels of their layer, or that pool twice."""
    pools = list(subject.graph_module.graph.find_nodes(op="call_function", target=pool_synapses))
    if not pools:
        return
    sites = {site.node: site for site in find_sites(subject.graph_module).found if not site.why_no_channels}
    for pool in pools:
        site, before = _pooled_layer(pool, sites)
        if site is None or pool.kwargs.get("channel_axis") != site.kind.channel_axis:
            continue
        gamma, channels = int(str(pool.kwargs["gamma"])), site.output_channels
        message = ""
        if gamma < 1 or channels % gamma:
            message = (
                f"{pool.name!r} sums groups of {gamma}, and the layer has {channels} channels; transform the "
                "model again, with a gamma that divides them"
            )
        elif before is not None:
            message = f"{pool.name!r} sums what {before.name!r} has summed already; transform the model again"
        yield finding(site.layer, pool.name, 1, int(bool(message)), message)


def _pooled_layer(pool: Node, sites: dict[Node, WeightSite]) -> tuple[WeightSite | None, Node | None]:
    """Return the layer that a pool belongs to and a pool in between, looked for along the only way back."""
    before: Node | None = None
    node = pool
    while True:
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if len(sources) != 1:
            return None, before
        (node,) = sources
        if node in sites:
            return sites[node], before
        if node.target is pool_synapses:
            before = node


_PLACED = {
    "mask_weight": "mask",
    "constrain_sign": "sign constraint",
    "scale_gradient": "learning rates",
    "scale_gradient_by_seed": "learning rates",
    "observe_activity": "observed activity",
    "observe_inputs": "watched units",
    "observe_state": "watched units",
    "pool_synapses": "pool of synapses",
    "fold_weight": "sum over synapses",
    "sum_sub_weights": "sum of sub-weights",
    "level_gradient": "division of gradients",
}
"""Operators that a mechanism consists of, and what of it is gone with them."""
_LINE = re.compile(r"(\w+) = (\w+)\((\w*)")
_READ = re.compile(r"(\w+) = self\.(\S+)")


@invariant("asked", "every mechanism that was asked for reached something, and what was named for it")
def unmet(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find mechanisms that were asked for and reached nothing, or not what was named for them."""
    record = record_of(subject.graph_module)
    if record is None:
        return
    for step in record.steps:
        yield finding("", "", 1)
        for entry in step.unmet:
            layer, count = str(entry["layer"]), int(entry["considered"])
            message = (
                f"asked for and not there: {entry['mechanism']} - {entry['message']}; change the "
                "model or the options, or leave it out of the config"
            )
            yield finding(layer, str(entry["mechanism"]), count, count, message)
        if step.config is not None:
            yield from _rates(subject, step, step.config)


def _rates(subject: Subject, step: TransformStep, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Find rates that a converter was asked for and no layer has."""
    given = [config, *({**config, **entry["options"]} for entry in config["overrides"])]
    states = [placed.state for placed in subject.states()]
    wanted = any(
        fields["fuzzy_lr_distribution"] != Distribution.BASELINE.value
        and fields["fuzzy_learning_rate_factor_nu"]
        for fields in given
    )
    if step.door != "transform" and wanted and not any(state.has_factors for state in states):
        message = f"asked for and not there: rates - 0 of {len(states)} weights have any"
        yield finding("", "rates", max(1, len(states)), max(1, len(states)), message)


@invariant("kept", "what a mechanism put into the graph is still there")
def kept(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find nodes of a mechanism that the graph had when the model was made, and has no more."""
    record = record_of(subject.graph_module)
    if record is None:
        return
    present = {node.name for node in whole_graph(subject.graph_module).nodes}
    read = {match[1]: match[2] for line in record.graph if (match := _READ.match(line))}
    for line in record.graph:
        match = _LINE.match(line)
        if match is None or match[2] not in _PLACED:
            continue
        name, operator, weight = match.groups()
        path = read.get(weight, "")
        gone = name not in present
        message = (
            f"its {_PLACED[operator]} ({name!r}) is gone from the graph that biofx.transform made; "
            "transform the model again, or change graphs with passes"
        )
        yield finding(owner_of(path) if path else "", path or name, 1, int(gone), message)


INVARIANTS = (
    check_signs.effective_signs,
    check_signs.sign_values,
    check_signs.bypassed_constraints,
    check_signs.rule_signs,
    check_signs.gammas,
    check_signs.unit_order,
    check_masks.effective_masks,
    check_masks.mask_values,
    check_masks.mask_uses,
    check_states.rates,
    check_states.rate_shapes,
    check_states.scaling,
    splits,
    check_states.sub_weight_sums,
    check_states.finite,
    check_states.links,
    check_states.devices,
    compiled_graph,
    unmet,
    kept,
)
"""What :func:`check` audits, in the order of the audit."""
