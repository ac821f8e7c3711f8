"""Invariants of the graph itself and of split weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from biofx.diagnostics.check_report import Finding
from biofx.diagnostics.check_subject import Subject, Uses
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite
from biofx.operators.split_ops import pool_synapses


def fitting_graph(subject: Subject) -> Finding:
    """Find a graph that does not fit its module; what such a graph computes cannot be told."""
    graph, message = subject.graph_module.graph, ""
    try:
        for module in subject.graphs.values():
            module.graph.lint()
    except Exception as error:
        message = f"the graph does not fit the model: {error}; transform the model anew"
    return Finding("", "graph", "", len(graph.nodes), int(bool(message)), message)


def compiled_graph(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find a graph that is not what the module runs."""
    for path, module in subject.graphs.items():
        is_run = module.graph.python_code("self").src == module.code
        own = f"bio_model.get_submodule({path!r})" if path else "bio_model"
        message = "" if is_run else f"it was changed and the module runs the old one; call {own}.recompile()"
        yield Finding(path, "graph", path, 1, int(not is_run), message)


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
                "model anew, with a gamma that divides them"
            )
        elif before is not None:
            message = f"{pool.name!r} sums what {before.name!r} has summed already; transform the model anew"
        yield Finding(site.layer, "splits", pool.name, 1, int(bool(message)), message)


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
