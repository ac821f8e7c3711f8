"""A pass for a slot of inductor that its owner fills: ``torch._inductor.config.pre_grad_custom_pass``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from biofx._version import __version__
from biofx.capture.aten_functions import is_aten
from biofx.compiling.dynamo_frames import current_compilation, examples_of
from biofx.compiling.flat_graphs import flat_graph, modes_read
from biofx.compiling.named_graphs import module_paths
from biofx.compiling.rewriter import Rewriter
from biofx.config import BioConfig
from biofx.errors import PassError
from biofx.rewriting.compile_config import PassChoice, choose_passes
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.plain_passes import pass_to_plain
from biofx.torch_private import count_as_inductor_pass
from biofx.transform import as_config

_OWN = "biofx.passes"
_BACKEND = "torch.compile(model, backend=biofx.backend(config))"


def inductor_pass(
    passes: PassChoice | None = None, config: BioConfig | Mapping[str, Any] | None = None
) -> InductorPass:
    """Return a pass for inductor's slot ``torch._inductor.config.pre_grad_custom_pass``.

    It is for those who compile with inductor already and own that slot. In it a graph still has functions on
    parameters that have names, and no gradients yet; the slots after it have neither, and the pass refuses to
    run there. Nothing is kept beside the model, so what is in the graph must be all of it: splits, and rates
    that are sampled from their seed (``fuzzy_lr_dtype="seed"``). For everything else there is
    :func:`biofx.backend`.

    Args:
        passes: as for :func:`biofx.transform`.
        config: as for :func:`biofx.transform`.

    Raises:
        OptionError: the config has an unknown field or a bad value.
        PipelineError: ``passes`` names an unknown pass, or the order is cyclic.
    """
    checked = as_config(config)
    count_as_inductor_pass(InductorPass)
    return InductorPass(choose_passes(passes, checked), checked)


class InductorPass:
    """What :func:`biofx.inductor_pass` returns.

    Args:
        pipeline: the passes.
        config: that they are from, if there is one.
    """

    def __init__(self, pipeline: Pipeline, config: BioConfig | None = None) -> None:
        self.pipeline, self._config = pipeline, config

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph in place.

        Raises:
            PassError: the graph is not one of functions on parameters, is a part of the model, or the passes
                keep something beside it.
            BiofxError: as for :func:`biofx.backend`.
        """
        source = graph.owning_module
        if source is None or any(map(is_aten, graph.nodes)):
            raise PassError(
                "expected the graph of torch._inductor.config.pre_grad_custom_pass, found one of operators, "
                "as in the slots for joint and post-grad graphs, where parameters have no names; gradients "
                "are computed already; put the pass into pre_grad_custom_pass"
            )
        values = {node.name: value for node, value in examples_of(source).items()}
        parameters = [value for value in values.values() if isinstance(value, nn.Parameter)]
        compilation = current_compilation(source, parameters)
        if compilation is None or not parameters:
            return
        if not compilation.is_whole:
            raise PassError(
                f"expected the graph of a whole model, found a part of {type(compilation.model).__name__}: "
                f"{compilation.begins_late or compilation.ends_early}; remove the cut, or use {_BACKEND}"
            )
        rewriter = Rewriter(self.pipeline, self._config, initialise=False)
        named, companion = rewriter.rewritten(source, values, module_paths(compilation.model), compilation)
        modes = dict.fromkeys(modes_read(named.module.graph), compilation.model.training)
        flat = flat_graph(named, companion.find, modes)
        if flat.state:
            raise PassError(
                f"expected passes that keep nothing beside the graph, found {flat.state[0]!r} and others of "
                f"{self.pipeline}; take rates from their seed (fuzzy_lr_dtype='seed'), or use {_BACKEND}"
            )
        _replace(graph, flat.module)

    def uuid(self) -> str | None:
        """Return what the compiler's cache knows the pass by; None, which bypasses it, for others' passes."""
        entries = list(_innermost(self.pipeline))
        plain = repr(pass_to_plain(self.pipeline))
        if "'unnamed'" in plain or any(not type(entry).__module__.startswith(_OWN) for entry in entries):
            return None
        return f"biofx {__version__}: {plain}"


def _innermost(entry: Pass) -> list[Pass]:
    if not isinstance(entry, Pipeline):
        return [entry]
    return [found for member in entry.passes for found in _innermost(member)]


def _replace(graph: Graph, made: GraphModule) -> None:
    """Let a graph compute what another does, on its own inputs."""
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder":
            graph.erase_node(node)
    owner: Any = graph.owning_module
    for name, module in made.named_children():
        owner.add_module(name, module)
    copied = {node: inputs[node.name] for node in made.graph.find_nodes(op="placeholder")}
    graph.output(graph.graph_copy(made.graph, copied))
