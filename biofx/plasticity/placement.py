"""Where in a model a weight's plasticity is kept."""

from __future__ import annotations

from torch import nn

from biofx.errors import PlasticityError
from biofx.layers.other_reads import READ
from biofx.layers.weight_site import Weight
from biofx.plasticity.bio_module import BioModule


def bio_module_path(parameter_path: str) -> str:
    """Return where a weight's state is kept: ``bio_mod`` beside ``weight``, else a place named after it.

    >>> bio_module_path("layer1.0.conv1.weight"), bio_module_path("encoder.projection")
    ('layer1.0.conv1.bio_mod', 'encoder.bio_mod.projection')
    """
    owner, _, name = parameter_path.rpartition(".")
    parts = [owner] if owner else []
    return ".".join([*parts, "bio_mod"] if name == "weight" else [*parts, "bio_mod", name])


def kept_state(model: nn.Module, parameter_path: str) -> BioModule | None:
    """Return the state of a weight, None if it has none yet."""
    try:
        state = model.get_submodule(bio_module_path(parameter_path))
    except AttributeError:
        return None
    return state if isinstance(state, BioModule) else None


def is_taken(parameter_path: str) -> bool:
    """Whether the place named after a parameter is an attribute that every state has anyway.

    >>> is_taken("mix.sign"), is_taken("mix.weight"), is_taken("mix.gamma")
    (True, False, False)
    """
    name = parameter_path.rpartition(".")[2]
    return name != "weight" and hasattr(BioModule(), name)


def state_of(model: nn.Module, weight: Weight) -> BioModule:
    """Return the state of a weight, made if it is not there yet, which knows how the weight is laid out.

    Raises:
        PlasticityError: something else is in its place.
    """
    state = bio_module_at(model, weight.path)
    kinds = [site.kind for site in weight.sites if site.kind is not READ] or [READ]
    state.inputs_first = all(kind.transposed for kind in kinds)
    state.why_no_synapses = next((kind.why_no_units for kind in kinds if kind.why_no_units), "")
    return state


def bio_module_at(model: nn.Module, parameter_path: str) -> BioModule:
    """Return the state of a weight, made if it is not there yet, and linked to the weight's layer.

    Raises:
        PlasticityError: something else is in its place.
    """
    module: nn.Module = model
    for part in bio_module_path(parameter_path).split("."):
        found = module._modules.get(part)
        inside = part == "bio_mod" or isinstance(module, BioModule)
        if found is None and inside:
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
            f"found a {type(module).__name__}: tracing a transformed model anew keeps its buffers and "
            "forgets its rules; run rules on the model that biofx.transform returned"
        )
    module.saves_memory = True
    module.path = parameter_path
    module.link(model.get_submodule(parameter_path.rpartition(".")[0]))
    return module
