"""Plasticity rules on whole models: all layers that can, or none."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule

from biofx.errors import PlasticityError
from biofx.layers.sites import find_sites
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.placement import kept_state, state_of


def bio_modules(model: nn.Module) -> dict[str, BioModule]:
    """Return the plasticity state of a model's weights, by the path of the weight; one for a tied weight."""
    found: dict[str, BioModule] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, BioModule) and module.is_linked:
            parameter = module.parameter
            if parameter is None or id(parameter) not in seen:
                found[module.path] = module
                seen.add(id(parameter))
    return found


def expanded_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights whose units ``expand-units`` has split into pairs, by path."""
    return {
        path: state.weight
        for path, state in bio_modules(model).items()
        if state.is_expanded and state.parameter is not None
    }


def prepare_states(model: nn.Module) -> dict[str, BioModule]:
    """Return the state of every weight, made where a layer has none yet.

    The model's state dict stays as it is: what is made now keeps its memory out of it.

    Raises:
        PlasticityError: the model is no graph module, or has no weight that rules could act on.
    """
    if not isinstance(model, GraphModule):
        raise PlasticityError(
            f"expected a transformed or converted model, found a {type(model).__name__}; "
            "use biofx.transform or biofx.BioConverter first"
        )
    for weight in find_sites(model).weights():
        before = kept_state(model, weight.path)
        saves_memory = before is not None and before.saves_memory
        state_of(model, weight).saves_memory = saves_memory
    return bio_modules(model)


def exposed_rules(model: nn.Module) -> set[str]:
    """Return the names of the rules that the model's layers offer."""
    return {
        name
        for module in model.modules()
        if isinstance(module, BioModule)
        for name in module.exposed_functions
    }


def apply_rule(model: nn.Module, rule: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Apply a rule to every layer that offers it.

    Layers with a reason against it (no gradient, frozen, …) are left alone and say so in the result.

    Returns:
        For each weight's path what the rule returned (for those of biofx how many synapses it touched), or
        the reason why it was left alone.

    Raises:
        PlasticityError: the graph does already what the rule would do, or every layer has a reason against
            it; nothing has been changed.
        NonFiniteWeightError: a weight that the rule would touch is NaN or infinite; nothing has been changed.
    """
    states = {path: state for path, state in bio_modules(model).items() if rule in state.exposed_functions}
    reasons = {path: state.why_not(rule) for path, state in states.items()}
    if rule == "fuzzy_learning_rates" and any(state.scaled_in_graph for state in states.values()):
        raise PlasticityError(
            "fuzzy_learning_rates: the graph scales the gradients already, during backward; calling it too "
            "would apply the factors twice. Leave the call out, or convert the model with BioConverter"
        )
    may_idle = rule == "update_fuzzy_learning_rates"  # static factors stay as they are, as asked
    if not may_idle and all(reason is not None for reason in reasons.values()):
        told = "; ".join(f"{path}: {reason}" for path, reason in reasons.items()) or "no layer offers it"
        raise PlasticityError(f"{rule} has nothing to act on ({told})")
    for path, state in states.items():
        if reasons[path] is None:
            state.check(rule)
    return {
        path: reasons[path] if reasons[path] is not None else getattr(state, rule)(*args, **kwargs)
        for path, state in states.items()
    }
