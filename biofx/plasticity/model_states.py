"""The plasticity of a whole model: where the state of each weight is kept, and rules on all of them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule

from biofx.errors import PlasticityError
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import READ, Weight
from biofx.plasticity.bio_module import BioModule
from biofx.torch_private import inside_of_compiled

_WRAPPERS = ("DistributedDataParallel", "DataParallel")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers (DDP, ``torch.compile``), or the model itself."""
    while True:
        is_wrapper = type(model).__name__ in _WRAPPERS and hasattr(model, "module")
        inner = inside_of_compiled(model) or (model.module if is_wrapper else None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


# the place of a state


def bio_module_path(parameter_path: str) -> str:
    """Return the path of a weight's state: ``bio_mod`` beside ``weight``, else a place named after it.

    >>> bio_module_path("layer1.0.conv1.weight"), bio_module_path("encoder.projection")
    ('layer1.0.conv1.bio_mod', 'encoder.bio_mod.projection')
    """
    owner, _, name = parameter_path.rpartition(".")
    parts = [owner] if owner else []
    return ".".join([*parts, "bio_mod"] if name == "weight" else [*parts, "bio_mod", name])


def is_taken(parameter_path: str) -> bool:
    """Whether the place named after a parameter is an attribute that every state has.

    >>> is_taken("mix.sign"), is_taken("mix.weight"), is_taken("mix.gamma")
    (True, False, False)
    """
    name = parameter_path.rpartition(".")[2]
    return name != "weight" and hasattr(BioModule(), name)


def kept_state(model: nn.Module, parameter_path: str) -> BioModule | None:
    """Return the state of a weight, None if it has none yet."""
    try:
        state = model.get_submodule(bio_module_path(parameter_path))
    except AttributeError:
        return None
    return state if isinstance(state, BioModule) else None


def state_of(model: nn.Module, weight: Weight) -> BioModule:
    """Return the state of a weight, made if it does not exist yet, which knows how the weight is laid out.

    Raises:
        PlasticityError: something else is in its place.
    """
    state = bio_module_at(model, weight.path)
    kinds = [site.kind for site in weight.sites if site.kind is not READ] or [READ]
    state.inputs_first = all(kind.transposed for kind in kinds)
    reasons = [kind.why_no_units for kind in kinds]
    reasons += [site.computation.why_no_synapses for site in weight.sites if site.computation is not None]
    state.why_no_synapses = next((reason for reason in reasons if reason), "")
    return state


def bio_module_at(model: nn.Module, parameter_path: str) -> BioModule:
    """Return the state of a weight, made if it does not exist yet, and linked to the weight's layer.

    Raises:
        PlasticityError: something else is in its place.
    """
    module: nn.Module = model
    for part in bio_module_path(parameter_path).split("."):
        found = module._modules.get(part)
        if found is None and (part == "bio_mod" or isinstance(module, BioModule)):
            found = BioModule()
            module.add_module(part, found)
        if found is None:
            raise AttributeError(
                f"{type(module).__name__} has no module {part!r} on the way to {parameter_path!r}"
            )
        module = found
    if not isinstance(module, BioModule):
        raise PlasticityError(
            f"expected the plasticity state of {parameter_path!r} at {bio_module_path(parameter_path)!r}, "
            f"found a {type(module).__name__}: tracing a transformed model again keeps its buffers and loses "
            "its rules; run rules on the model that biofx.transform returned"
        )
    if module.path != parameter_path or not module.saves_memory:
        module.saves_memory, module.path = True, parameter_path
    module.link(model.get_submodule(parameter_path.rpartition(".")[0]))
    return module


# all states of a model


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

    The model's state dict does not change: the memory of a state that is made here is not saved in it.

    Raises:
        PlasticityError: the model is not a graph module.
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


# rules on all weights


def exposed_rules(model: nn.Module) -> set[str]:
    """Return the names of the rules that the model's layers offer."""
    states = (module for module in model.modules() if isinstance(module, BioModule))
    return {name for state in states for name in state.exposed_functions}


def apply_rule(model: nn.Module, rule: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Apply a rule to every layer that offers it.

    Layers that a rule cannot act on (no gradient, frozen, …) are left alone, and the result says why.

    Returns:
        For each weight's path what the rule returned (for those of biofx how many synapses it touched), or
        the reason why it was left alone.

    Raises:
        PlasticityError: the graph applies the rule already, or no layer can follow it; nothing has been
            changed.
        NonFiniteWeightError: a weight that the rule would touch is NaN or infinite; nothing has been changed.
    """
    states = {path: state for path, state in bio_modules(model).items() if rule in state.exposed_functions}
    if rule == "fuzzy_learning_rates" and any(state.scaled_in_graph for state in states.values()):
        raise PlasticityError(
            "fuzzy_learning_rates: the graph scales the gradients already, during backward; calling it too "
            "would apply the factors twice. Leave the call out, or convert the model with BioConverter"
        )
    reasons = {path: state.why_not(rule) for path, state in states.items()}
    may_idle = rule == "update_fuzzy_learning_rates"  # static factors stay as they are, as configured
    if not may_idle and all(reason is not None for reason in reasons.values()):
        raise PlasticityError(f"{rule} has nothing to act on ({describe_reasons(reasons)})")
    for path, state in states.items():
        if reasons[path] is None:
            state.check(rule)
    return {
        path: reasons[path] if reasons[path] is not None else getattr(state, rule)(*args, **kwargs)
        for path, state in states.items()
    }


def describe_reasons(reasons: dict[str, str | None]) -> str:
    """Return why each weight is left alone, in words."""
    return "; ".join(f"{path}: {reason}" for path, reason in reasons.items()) or "no layer offers it"
