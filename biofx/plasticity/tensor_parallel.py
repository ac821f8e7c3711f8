"""Layers that ranks compute in parts (``parallelize_module``): what plasticity can follow, and what not.

Each rank holds a part of such a layer's weight, of its factors, signs and mask, and computes with these. What
is about units of the layer, or about groups of them, would need the parts of the others, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import GraphModule

from biofx.errors import PlasticityError
from biofx.plasticity.agreement import is_parallelized
from biofx.plasticity.bio_module import BioModule

_SPLITS = "biofx.operators.split_ops"
_REMEDY = "leave it out of the plan of parallelize_module, or transform the model without that"


def layers_in_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that ranks compute in parts, with their paths."""
    for path, module in model.named_modules():
        if is_parallelized(module):
            yield path, module


def refuse_in_parts(model: nn.Module) -> None:
    """Refuse a model in which ranks compute parts of what plasticity needs all of; it is left unchanged.

    Raises:
        PlasticityError: there is such a layer.
    """
    layers = list(layers_in_parts(model))
    for path, layer in layers:
        state = layer._modules.get("bio_mod")
        reason = _reason_against(state) if isinstance(state, BioModule) else None
        if reason is not None:
            raise PlasticityError(f"{path!r} is computed in parts by several ranks, and {reason}; {_REMEDY}")
    splits = next(_splits_in(model), None) if layers else None
    if splits is not None:
        raise PlasticityError(
            f"{layers[0][0]!r} is computed in parts by several ranks, and the graph sums groups of channels "
            f"or sub-weights, which may lie on two of them (node {splits!r}); transform the model without "
            "weight splitting"
        )


def _reason_against(state: BioModule) -> str | None:
    """Return why the state of a layer's weight cannot be kept in parts, None if it can."""
    if state.observed_activity is not None:
        return "its factors follow the activity of units that a rank sees only some of"
    if state.input_activity is not None or not isinstance(state.turnover, str):
        return "units that it makes or reads are turned over by activity that a rank sees only some of"
    if state.has_sub_weights:
        return "its weight is a sum of sub-weights, which parallelize_module does not share out"
    if state.is_expanded or state.reads_pairs:
        return "its units are pairs (dales_method='expand'), which lie on different ranks"
    return None


def _splits_in(model: nn.Module) -> Iterator[str]:
    """Yield the names of nodes that split weights, in all graphs of a model."""
    for module in model.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if getattr(node.target, "__module__", "") == _SPLITS:
                    yield node.name
