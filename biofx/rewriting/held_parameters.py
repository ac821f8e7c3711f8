"""The state of parameters that are no weights, for the rules that hold parameters back.

Synaptic intelligence and its relatives act on all parameters of a model: on biases, gains of normalisations
and parameters that are used directly, too. None of them needs to be known in the graph for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from biofx.config import BioConfig
from biofx.model.graph_module import BioGraphModule
from biofx.plasticity.bio_state import rule_config
from biofx.plasticity.model_states import bio_module_at, bio_modules, is_taken
from biofx.select import NodeIndex, module_calls

_ASKING = frozenset({"consolidation", "l2_to_initial_strength"})
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def hold_parameters(graph_module: BioGraphModule, config: BioConfig) -> None:
    """Give every parameter without a state one, where the config holds such parameters back.

    Args:
        graph_module: the rewritten model.
        config: of the whole model.

    Raises:
        SelectorError: an override's selector matches nothing.
    """
    asking = any(not _ASKING.isdisjoint(dict(override.options)) for override in config.overrides)
    if not asking and not _holds(config):
        return
    index = NodeIndex(graph_module)
    matches = [index.matches(override.selector) for override in config.overrides]
    nodes: dict[str, set[object]] = {}
    for candidate in index.candidates:
        calls = module_calls(candidate.node)
        nodes.setdefault(calls[-1][0] if calls else "", set()).add(candidate.node)
    for path in list(_without_state(graph_module)):
        owner = path.rpartition(".")[0]
        here = nodes.get(owner, set())
        fields = {
            name: value
            for override, found in zip(config.overrides, matches, strict=True)
            if any(owner in match.paths or match.nodes & here for match in found)
            for name, value in override.options
        }
        own = config.replace(**fields)
        if _holds(own) and own.consolidation_parameters == "all":
            hold_parameter(graph_module, path, rule_config(own))


def hold_again(graph_module: BioGraphModule, rules: Iterable[tuple[str, BioConfig]]) -> None:
    """Give parameters the states that they had when the options of their rules were saved.

    Args:
        graph_module: made as the saved model was.
        rules: path and options of each weight and parameter that had a state.
    """
    without = set(_without_state(graph_module))
    for path, config in rules:
        if path in without and _holds(config):
            hold_parameter(graph_module, path, config)


def hold_parameter(graph_module: BioGraphModule, path: str, config: BioConfig) -> None:
    """Give one parameter a state with these options, on which no other rules act."""
    state = bio_module_at(graph_module, path)
    state.only_held = True
    state.why_no_synapses = "it is no weight of a layer"
    state.config = config
    state.keep_buffers()


def _holds(config: BioConfig) -> bool:
    return config.consolidation != "off" or config.l2_to_initial_strength > 0


def _without_state(graph_module: BioGraphModule) -> Iterator[str]:
    """Yield the paths of parameters that have no state and can have one."""
    known = {id(state.parameter) for state in bio_modules(graph_module).values()}
    for path, parameter in graph_module.named_parameters():
        owner = graph_module.get_submodule(path.rpartition(".")[0])
        inside = "bio_mod" in path.split(".") or isinstance(owner, _CONTAINERS) or is_taken(path)
        lazy = isinstance(parameter, nn.UninitializedParameter)
        if id(parameter) not in known and not inside and not lazy and parameter.is_floating_point():
            yield path
